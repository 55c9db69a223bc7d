"""Samples out of memory-mapped files: fields as they were stored, and packed rows of tokens.

A part (train or validation) of a source is little-endian files beside each other: PART.FIELD holds
the values of a field of all samples, one after the other; PART.SEQUENCE.offsets (int64) where each
sample's begin along a sequence, and the end; PART.rows (int64, packed tokens only) the first
document of each packed row, and the last one. Ids (int64 in a batch) take four bytes on disk.

Of a row of tokens, position_ids and document_ids are made here; so are the labels where none are
stored: then a token's label is the token that follows it in its document.
Shapes: T tokens per sample (`sequence_tokens`, or less when rows are not packed).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.data.batch import Array
from shoal.errors import DataError
from shoal.fields import IGNORED, Field, Fields

Ints = npt.NDArray[np.int64]

ON_DISK = {"uint8": "<u1", "int32": "<i4", "int64": "<i4", "float32": "<f4"}
"""Type in a file of each type in a batch."""

DERIVED = ("labels", "position_ids", "document_ids")
"""Fields of the sequence `tokens` that are made when rows are read, where they are not stored."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How the samples of a part are cut, and their fields: of a batch, and those in files."""

    sequence_tokens: int
    """T: what a row of tokens is cut to."""
    packing: bool
    """Whether a row holds several documents, or one."""
    fields: Fields
    stored: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.packing and any(self.fields[n].sequence != "tokens" for n in self.stored):
            raise ValueError(f"only rows of tokens can be packed, got the fields {self.stored}")

    @property
    def predicts_next(self) -> bool:
        """Whether a token's label is the token after it."""
        return "labels" in self.fields and "labels" not in self.stored

    @property
    def sequences(self) -> tuple[str, ...]:
        """Names of the sequences that stored fields run along."""
        found = [self.fields[name].sequence for name in self.stored]
        return tuple(dict.fromkeys(each for each in found if each is not None))

    @property
    def lengths(self) -> dict[str, int]:
        """Sequences that are equally long in every batch: packed rows of tokens."""
        return {"tokens": self.sequence_tokens} if self.packing else {}

    def to_json(self) -> dict[str, Any]:
        """Plain data, read back by `from_json`."""
        fields = {name: asdict(field) for name, field in self.fields.items()}
        return {**vars(self), "fields": fields, "stored": list(self.stored)}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Shape:
        """The inverse of `to_json`."""
        fields = {name: Field.from_json(each) for name, each in tree["fields"].items()}
        return cls(**{**tree, "fields": fields, "stored": tuple(tree["stored"])})


def row_count(num_tokens: int, *, shape: Shape) -> int:
    """Packed rows that `num_tokens` fill; the last may be short.

    Where a token's label is the next token, the very last is only a target and needs no row.
    """
    inputs = num_tokens - 1 if shape.predicts_next else num_tokens
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

    def __init__(self, folder: Path, *, part: str, shape: Shape, num_samples: int) -> None:
        self.shape = shape
        self.bytes_read = 0
        self._num_samples = num_samples
        self._rows = _open(folder / f"{part}.rows", dtype="<i8") if shape.packing else None
        self._offsets = {
            each: _open(folder / f"{part}.{each}.offsets", dtype="<i8") for each in shape.sequences
        }
        self._values = {
            name: open_values(folder / f"{part}.{name}", field=shape.fields[name])
            for name in shape.stored
        }

    def __len__(self) -> int:
        return self._num_samples

    def row(self, sample: int) -> dict[str, Array]:
        """Sample number `sample`, every field an array; a row of tokens is cut at T.

        Labels of language models are already shifted.
        """
        if self._rows is not None:
            return self._packed(sample)
        edges = {
            each: self._read(offsets, start=sample, stop=sample + 2)
            for each, offsets in self._offsets.items()
        }
        row: dict[str, Array] = {}
        for name in self.shape.stored:
            sequence, dim = self.shape.fields[name].sequence, self.shape.fields[name].ragged_dim
            start, stop = (sample, sample + 1) if sequence is None else edges[sequence]
            values = self._read(self._values[name], start=int(start), stop=int(stop))
            row[name] = values[0] if dim is None else np.moveaxis(values, 0, dim)
        return self._with_places(row) if "tokens" in edges else row

    def _with_places(self, row: dict[str, Array]) -> dict[str, Array]:
        """A document of tokens, cut at T, with what is derived of it."""
        if self.shape.predicts_next:
            row["labels"] = np.append(row["input_ids"][1:], np.int32(IGNORED))
        count = min(len(row["input_ids"]), self.shape.sequence_tokens)
        cut = {
            name: array[:count] if self.shape.fields[name].sequence == "tokens" else array
            for name, array in row.items()
        }
        places = {
            "position_ids": np.arange(count, dtype=np.int64),
            "document_ids": np.zeros(count, dtype=np.int64),
        }
        return {**{n: a for n, a in places.items() if n in self.shape.fields}, **cut}

    def _packed(self, sample: int) -> dict[str, Array]:
        length = self.shape.sequence_tokens
        start = sample * length
        assert self._rows is not None, "packed parts have a row index"
        first, last = self._read(self._rows, start=sample, stop=sample + 2)
        # Offsets of the documents that begin inside the row, and of the one that goes on into it.
        edges = self._read(self._offsets["tokens"], start=int(first), stop=int(last) + 2)
        edges = edges.astype(np.int64)
        stop = start + length + (1 if self.shape.predicts_next else 0)
        row = {
            name: self._read(values, start=start, stop=stop)
            for name, values in self._values.items()
        }
        tokens = row["input_ids"]
        positions = np.arange(start, start + len(tokens), dtype=np.int64)
        documents = np.searchsorted(edges[1:], positions, side="right")
        count = length
        if self.shape.predicts_next:
            count = max(1, min(length, len(tokens) - 1))
            row["labels"] = np.full(len(tokens), IGNORED, dtype=np.int32)
            same = documents[1:] == documents[:-1]
            row["labels"][:-1][same] = tokens[1:][same]
        row["position_ids"] = positions - np.maximum(edges[documents], start)
        row["document_ids"] = documents
        return {name: array[:count] for name, array in row.items()}

    def _read(self, file: Array, *, start: int, stop: int) -> Array:
        part = np.array(file[start:stop])
        self.bytes_read += part.nbytes
        return part


def open_values(path: Path, *, field: Field) -> Array:
    """The values of a field in a file, mapped: [samples, *dims], or [positions, *the other dims].

    Raises DataError for a file that cannot be mapped.
    """
    inner = [size for size in field.dims if size is not None]
    return _open(path, dtype=ON_DISK[field.dtype]).reshape(-1, *inner)


def _open(path: Path, *, dtype: str) -> Array:
    try:
        return np.memmap(path, dtype=dtype, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be mapped ({error}); expected a prepared file. Delete its "
            f"folder, the next run prepares it again"
        ) from error
