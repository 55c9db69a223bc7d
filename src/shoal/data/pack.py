"""Samples out of memory-mapped token files: packed rows with document boundaries, or documents.

Shapes: B samples, T tokens per sample (`sequence_tokens`, or less when rows are not packed).
A part (train or validation) of a source is four little-endian files beside each other:
PART.tokens (int32), PART.offsets (int64, first token of each document and the end), PART.labels
(int32, only for tagging), PART.rows (int64, first document of each packed row, and the last one).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shoal.errors import DataError

IGNORED = -100
"""Label of a position without a target."""
PADDING_MULTIPLE = 8
"""Rows that are not packed are padded to a multiple of this many tokens."""

Ints = npt.NDArray[np.int64]
Batch = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How the samples of a part are cut: `sequence_tokens` (T), packed or one per document."""

    sequence_tokens: int
    packing: bool
    tagged: bool


@dataclass(frozen=True)
class Row:
    """One sample. All arrays [n], n <= T; `labels` are already shifted for language models."""

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    position_ids: Ints
    document_ids: Ints


def row_count(num_tokens: int, *, shape: Shape) -> int:
    """Packed rows that `num_tokens` fill; the last may be short.

    Of a language model's tokens the very last is only a target, so it needs no row of its own.
    """
    inputs = num_tokens if shape.tagged else num_tokens - 1
    return max(1, -(-inputs // shape.sequence_tokens))


def first_documents(offsets: Ints, *, shape: Shape) -> Ints:
    """Document that holds the first token of each packed row, then the last document [rows+1]."""
    rows = row_count(int(offsets[-1]), shape=shape)
    starts = np.arange(rows, dtype=np.int64) * shape.sequence_tokens
    first = np.searchsorted(offsets, starts, side="right") - 1
    return np.append(first, len(offsets) - 2)


class Part:
    """One part of one prepared source, read sample by sample; counts the bytes it reads.

    Not for sharing between threads: the count would race. Opening one costs under a millisecond.
    """

    def __init__(self, folder: Path, *, part: str, shape: Shape) -> None:
        self.shape = shape
        self.bytes_read = 0
        self._tokens = _open(folder / f"{part}.tokens", dtype="<i4")
        self._offsets = _open(folder / f"{part}.offsets", dtype="<i8")
        self._rows = _open(folder / f"{part}.rows", dtype="<i8") if shape.packing else None
        self._labels = _open(folder / f"{part}.labels", dtype="<i4") if shape.tagged else None

    def __len__(self) -> int:
        return len(self._offsets if self._rows is None else self._rows) - 1

    def row(self, sample: int) -> Row:
        """Sample number `sample`: a packed row, or a document cut at T tokens."""
        return self._document(sample) if self._rows is None else self._packed(sample)

    def _packed(self, sample: int) -> Row:
        length = self.shape.sequence_tokens
        start = sample * length
        assert self._rows is not None, "packed parts have a row index"
        first, last = self._read(self._rows, start=sample, stop=sample + 2)
        # Offsets of the documents that begin inside the row, and of the one that goes on into it.
        edges = self._read(self._offsets, start=int(first), stop=int(last) + 2).astype(np.int64)
        tokens = self._read(self._tokens, start=start, stop=start + length + 1)
        positions = np.arange(start, start + len(tokens), dtype=np.int64)
        documents = np.searchsorted(edges[1:], positions, side="right")
        count = max(1, min(length, len(tokens) - 1)) if self._labels is None else length
        if self._labels is None:
            labels = np.full(len(tokens), IGNORED, dtype=np.int32)
            same = documents[1:] == documents[:-1]
            labels[:-1][same] = tokens[1:][same]
        else:
            labels = self._read(self._labels, start=start, stop=start + length)
        begins = np.maximum(edges[documents], start)
        return Row(tokens[:count], labels[:count], (positions - begins)[:count], documents[:count])

    def _document(self, sample: int) -> Row:
        start, stop = self._read(self._offsets, start=sample, stop=sample + 2)
        tokens = self._read(self._tokens, start=int(start), stop=int(stop))
        count = min(len(tokens), self.shape.sequence_tokens)
        if self._labels is not None:
            labels = self._read(self._labels, start=int(start), stop=int(stop))
        else:
            labels = np.append(tokens[1:], np.int32(IGNORED))
        positions = np.arange(count, dtype=np.int64)
        return Row(tokens[:count], labels[:count], positions, np.zeros(count, dtype=np.int64))

    def _read(self, file: npt.NDArray[np.generic], *, start: int, stop: int) -> npt.NDArray:  # type: ignore[type-arg]
        part = np.array(file[start:stop])
        self.bytes_read += part.nbytes
        return part


def _open(path: Path, *, dtype: str) -> npt.NDArray[np.generic]:
    try:
        return np.memmap(path, dtype=dtype, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be mapped ({error}); expected a prepared token file. Delete its "
            f"folder, the next run prepares it again"
        ) from error


def stack(rows: list[Row], *, width: int) -> Batch:
    """Arrays [B, width] of `rows`, padded on the right (label -100, document -1, token 0)."""
    shape = (len(rows), width)
    batch: Batch = {
        "input_ids": np.zeros(shape, dtype=np.int64),
        "labels": np.full(shape, IGNORED, dtype=np.int64),
        "position_ids": np.zeros(shape, dtype=np.int64),
        "document_ids": np.full(shape, -1, dtype=np.int32),
    }
    for number, row in enumerate(rows):
        count = len(row.input_ids)
        batch["input_ids"][number, :count] = row.input_ids
        batch["labels"][number, :count] = row.labels
        batch["position_ids"][number, :count] = row.position_ids
        batch["document_ids"][number, :count] = row.document_ids
    return batch


def width_of(rows: list[Row], *, shape: Shape) -> int:
    """T for packed rows; else the longest row, rounded up to `PADDING_MULTIPLE`."""
    if shape.packing:
        return shape.sequence_tokens
    longest = max((len(row.input_ids) for row in rows), default=1)
    return -(-longest // PADDING_MULTIPLE) * PADDING_MULTIPLE
