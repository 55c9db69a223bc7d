"""Writes a model's safetensors files tensor by tensor, piece by piece, as transformers would.

The bytes are those of `save_pretrained`: the same division into files, the same order inside them
(by name), the same headers and index (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from shoal.errors import ModelError
from shoal.models.stored import Form, Stored, Weights, boxes_in_order
from shoal.units import format_bytes

PIECE_BYTES = 64 << 20
"""Written at once where no limit asks for less."""
COPIES = 5
"""Times a piece may be in memory at once: mapped from its file, read, joined, checked and cast."""
_LEAST_BYTES = 10_000
"""A smaller limit would write a few numbers at a time."""

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_tensors(
    folder: Path, form: Form, weights: Weights, *, limit_bytes: int | None, shard_size: str
) -> None:
    """Write all of `form` into `folder`, in files of at most `shard_size`.

    Raises ModelError where a tensor cannot be made within the limit.
    """
    _check_limit(form, limit_bytes)
    piece_bytes = min(PIECE_BYTES, (limit_bytes or PIECE_BYTES * COPIES) // COPIES)
    metas = {name: stored.meta for name, stored in form.tensors.items()}
    split = split_torch_state_dict_into_shards(metas, max_shard_size=shard_size)
    source = _Source(form, weights, most_numel=max(1, piece_bytes // 4))
    for file, names in split.filename_to_tensors.items():
        _write_file(folder / file, sorted(names), source)
    if split.is_sharded:
        model: Any = form.model
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _check_limit(form: Form, limit_bytes: int | None) -> None:
    computed = {s.group for s in form.tensors.values() if s.weight is None}
    needed = max((form.group_bytes(group) for group in computed), default=0)
    if limit_bytes is not None and needed > limit_bytes:
        model: Any = form.model
        raise ModelError(
            f"{model.config.model_type}: its stored form joins or splits weights, which takes "
            f"{format_bytes(needed)} at once; the limit is {format_bytes(limit_bytes)}\n"
            f"    use --memory-limit {needed}B, or more"
        )
    if limit_bytes is not None and limit_bytes < _LEAST_BYTES:
        raise ModelError(
            f"a limit of {format_bytes(limit_bytes)} leaves room for {limit_bytes // 4 // COPIES} "
            f"numbers at a time\n    use --memory-limit {_LEAST_BYTES}B or more, or none"
        )


class _Source:
    """Gives stored tensors in pieces; keeps the group that was computed last."""

    def __init__(self, form: Form, weights: Weights, *, most_numel: int) -> None:
        self.form, self._weights, self._most_numel = form, weights, most_numel
        self._computed: tuple[int, dict[str, Tensor]] = (-1, {})

    def pieces(self, name: str, stored: Stored) -> Iterator[Tensor]:
        """The values of one tensor, in the order in which they lie in a file."""
        if stored.weight is None:
            if self._computed[0] != stored.group:
                self._computed = (-1, {})  # goes before the next one comes
                self._computed = (stored.group, self.form.compute(stored.group, self._weights))
            yield self._computed[1][name]
            return
        for box in boxes_in_order(stored.shape, most_numel=self._most_numel):
            value = self._weights.tensor(stored.weight, box=box)
            assert value is not None, "names were compared"
            yield value.to("cpu", self.form.dtype)


def _write_file(path: Path, names: list[str], source: _Source) -> None:
    """One file. The header is as safetensors itself writes it, to the last byte."""
    tensors, at = source.form.tensors, 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name in names:
        meta = tensors[name].meta
        end = at + meta.numel() * meta.itemsize
        header[name] = {
            "dtype": _DTYPES[meta.dtype],
            "shape": list(meta.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for piece in source.pieces(name, tensors[name]):
                file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
