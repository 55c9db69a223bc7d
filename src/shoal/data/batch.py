"""Batches of any fields: samples are stacked, rows filled up, and cut into micro batches. No torch.

A batch is a dict of arrays (numpy's or torch's) whose first dim is the sample. Every batch has
`sample_ids` and `source_ids` int64 [B] beside the fields of its task; a sample id below 0 marks a
row that only fills the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from shoal.fields import Field, Fields

Array = npt.NDArray[Any]
Batch = dict[str, Array]
T = TypeVar("T")
"""An array of numpy or a tensor of torch: both are cut by the same slices."""

PADDING_MULTIPLE = 8
"""Sequences are padded to a multiple of this many positions."""

INDEX: Fields = {"sample_ids": Field("int64", (), fill=-1), "source_ids": Field("int64", ())}
"""What every batch has: which samples its rows are, and of which source."""


def stack(
    samples: Sequence[Mapping[str, Array]], fields: Fields, *, lengths: Mapping[str, int]
) -> Batch:
    """Arrays [B, *dims] of samples, sequences padded behind with their field's `fill`.

    A sequence is as long as `lengths` says, else as its longest sample, rounded up to
    `PADDING_MULTIPLE`.
    """
    longest = dict(lengths)
    for name, field in fields.items():
        dim = field.ragged_dim
        if dim is not None and field.sequence is not None and field.sequence not in longest:
            most = max((each[name].shape[dim] for each in samples), default=1)
            longest[field.sequence] = _rounded(most, PADDING_MULTIPLE)
    batch: Batch = {}
    for name, field in fields.items():
        dims = [longest[field.sequence or ""] if dim is None else dim for dim in field.dims]
        array = np.full((len(samples), *dims), field.fill, dtype=field.dtype)
        for number, sample in enumerate(samples):
            held: tuple[Any, ...] = (number, *(slice(size) for size in sample[name].shape))
            array[held] = sample[name]
        batch[name] = array
    return batch


def fill_rows(batch: Batch, fields: Fields, *, count: int) -> Batch:
    """The batch with rows added up to `count` that hold nothing but fill."""
    missing = count - len(batch["sample_ids"])
    if not missing:
        return batch
    known = {**fields, **INDEX}
    return {
        name: np.concatenate(
            [array, np.full((missing, *array.shape[1:]), known[name].fill, dtype=array.dtype)]
        )
        for name, array in batch.items()
    }


def micro_batches(
    batch: Mapping[str, T], fields: Fields, *, rows: int, multiple: int = PADDING_MULTIPLE
) -> list[tuple[dict[str, T], int]]:
    """Parts of `rows` samples, with the number of the first; sequences cut to what they hold.

    A sequence goes on to the last position at which any of its fields is not fill in any sample
    of the part, rounded up to `multiple`. Works on arrays and on tensors in CPU memory.
    """
    count = len(batch["sample_ids"])  # type: ignore[arg-type]
    parts = []
    for start in range(0, count, rows):
        part = {name: array[start : start + rows] for name, array in batch.items()}  # type: ignore[index]
        parts.append((_trimmed(part, fields, multiple=multiple), start))
    return parts


def _trimmed(part: dict[str, T], fields: Fields, *, multiple: int) -> dict[str, T]:
    longest: dict[str, int] = {}
    for name, field in fields.items():
        if field.sequence is not None and name in part:
            used = _used(np.asarray(part[name]), field)
            longest[field.sequence] = max(longest.get(field.sequence, 0), used)
    cut = dict(part)
    for name, field in fields.items():
        if field.sequence is not None and name in part:
            length = max(multiple, _rounded(longest[field.sequence], multiple))
            before = (slice(None),) * (1 + field.dims.index(None))
            cut[name] = part[name][(*before, slice(length))]  # type: ignore[index]
    return cut


def _used(array: Array, field: Field) -> int:
    """Positions of a sequence up to the last that is not fill in every row."""
    dim = 1 + field.dims.index(None)
    others = tuple(each for each in range(array.ndim) if each != dim)
    held = np.flatnonzero((array != field.fill).any(axis=others))
    return int(held[-1]) + 1 if len(held) else 0


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
