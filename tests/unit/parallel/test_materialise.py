"""Ranks draw, or read from a folder, their own boxes only: the bits of the whole, cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.boxes import Box
from shoal.launch.pool import WorkerPool
from shoal.layout import Layout
from shoal.models.anatomy import anatomy_of, canonical_parameters, ties_of
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
from workers import run_workers


class Counting:
    """A source that counts the elements it was asked for."""

    def __init__(self, source: PretrainedWeights) -> None:
        self.source, self.numel = source, 0

    def tensor(self, name: str, *, box: Any = None) -> Tensor | None:
        found = self.source.tensor(name, box=box)
        self.numel += 0 if found is None else found.numel()
        return found


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of a worker of a layout of 4: shard 2 x tensor 2."""
    torch.set_num_threads(1)
    rank, device = payload["rank"], torch.device("cpu")
    meeting = Path(payload["store"]).as_uri()
    start_process_group(rank=rank, size=4, device=device, meeting=meeting, timeout_seconds=60)
    mesh = build_mesh(Layout(shard=2, tensor=2), rank=rank, device=device)
    family, found = payload["family"], {}
    for how in ("drawn", "read"):
        model = meta_model(family)
        ties, recorded = ties_of(model), record(model)
        source = None
        if how == "read":
            source = Counting(PretrainedWeights(payload["folder"], model=model))
        apply(model, anatomy_of(model), mesh, Settings())
        materialise(model, record=recorded, seed=8, source=source)
        whole = canonical_parameters(real_model(family, seed=8))
        differ, kept = [], 0
        for name, parts in parts_of(model).items():
            for box, tensor in parts:
                kept += box.numel
                if not torch.equal(tensor, whole[name][box.within(Box.whole(whole[name].shape))]):
                    differ.append(name)
        found[how] = {
            "differ": differ,
            "kept": kept,
            "asked": source.numel if source is not None else kept,
            "tied": ties_of(model) == ties,
            "whole": sum(each.numel() for each in whole.values()),
        }
    Report(descriptor).say("compared", found=found)
    stop_process_group()
    return 0


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_boxes_have_the_bits_of_the_whole(family: str, pool: WorkerPool, tmp_path: Path) -> None:
    """gpt2 is tied, transposed and fused; phi3 is fused in pieces of two sizes."""
    real_model(family, seed=8).save_pretrained(tmp_path / "model")  # type: ignore[operator]
    payload = {
        "family": family,
        "folder": str(tmp_path / "model"),
        "store": str(tmp_path / "store"),
    }
    ranks = run_workers(pool, "unit.parallel.test_materialise:run", payload, size=4)
    for each in ranks:
        for found in each.values():
            assert found["differ"] == [] and found["tied"], found
            assert found["asked"] == found["kept"] < 0.3 * found["whole"], found
