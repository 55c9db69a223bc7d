"""What the ranks of a cut model read of a folder of weights: bytes, and whether they are right.

`run` is what each worker of the pool does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.boxes import Box
from shoal.layout import Layout
from shoal.models import pretrained
from shoal.models.anatomy import anatomy_of, canonical_parameters
from shoal.models.init import record
from shoal.models.pretrained import PretrainedWeights
from shoal.observe.events import Report
from shoal.parallel.apply import apply
from shoal.parallel.materialise import materialise
from shoal.parallel.mesh import build_mesh
from shoal.parallel.settings import Settings
from shoal.runtime import start_process_group, stop_process_group
from states import parts_of
from unit.models.tiny_models import meta_model, real_model


class Counted:
    """`safe_open`, counting the bytes of every tensor and slice that it hands out."""

    num_bytes = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._file = _safe_open(*args, **kwargs)

    def __enter__(self) -> Counted:
        self._open = self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def get_tensor(self, name: str) -> Tensor:
        return _counted(self._open.get_tensor(name))

    def get_slice(self, name: str) -> _CountedSlice:
        return _CountedSlice(self._open.get_slice(name))


class _CountedSlice:
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getitem__(self, at: Any) -> Tensor:
        return _counted(self._inner[at])


def _counted(tensor: Tensor) -> Tensor:
    Counted.num_bytes += tensor.nbytes
    return tensor


_safe_open = pretrained.safe_open


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of one worker."""
    torch.set_num_threads(1)
    layout, rank, folder = Layout(**payload["layout"]), payload["rank"], Path(payload["folder"])
    device = torch.device("cpu")
    start_process_group(
        rank=rank,
        size=layout.workers,
        device=device,
        meeting=Path(payload["store"]).as_uri(),
        timeout_seconds=60,
    )
    pretrained.safe_open = Counted  # type: ignore[assignment]
    model = meta_model(payload["family"])
    drawn = record(model)
    source = PretrainedWeights(folder, model=model)
    apply(model, anatomy_of(model), build_mesh(layout, rank=rank, device=device), Settings())
    materialise(model, record=drawn, seed=0, source=source)
    written = real_model(payload["family"], seed=payload["seed"])
    whole, own_bytes, equal = canonical_parameters(written), 0, True
    for name, parts in parts_of(model).items():
        for box, tensor in parts:
            own_bytes += tensor.nbytes
            cut = box.within(Box.whole(whole[name].shape))
            equal = equal and torch.equal(tensor, whole[name][cut])
    found = {"rank": rank, "read": Counted.num_bytes, "own": own_bytes, "equal": equal}
    Report(descriptor).say("read", found={**found, "missing": source.missing})
    stop_process_group()
    return 0
