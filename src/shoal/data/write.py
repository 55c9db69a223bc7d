"""Writes the files of a source: samples as they come, then split, ordered and cut into parts."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from shoal.data.batch import Array
from shoal.data.counts import Counts
from shoal.data.pack import DERIVED, ON_DISK, Shape, first_documents, open_values
from shoal.data.permutation import key_of
from shoal.data.storage import contents_of
from shoal.errors import DataError
from shoal.fields import Field, Fields
from shoal.splitmix import mixed

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Sample = Mapping[str, Any]
"""Values of each stored field of one sample: lists, numbers or arrays."""

_CHUNK_ELEMENTS = 1 << 22


class EncodedSamples:
    """All samples of a source in its own order, spilled to scratch files, field by field."""

    def __init__(self, scratch: Path, *, fields: Fields, where: str) -> None:
        self.scratch, self.fields, self.where = scratch, fields, where
        self.stored: tuple[str, ...] = ()
        self._lengths: dict[str, array[int]] = {}
        self._records, self._samples = array("Q"), array("Q")

    def add(self, samples: Sequence[Sample], *, hashes: Sequence[int]) -> None:
        """Append samples; those whose first field is empty are left out.

        `hashes`: of the record that each sample was made of (`columns.content_hash`).
        Raises DataError for values out of range, of another shape than their field, for fields
        of one sequence that differ in length, or when there is not a sample for each record.
        """
        if len(samples) != len(hashes):
            raise DataError(
                f"{self.where}: expected a sample of each record, got {len(samples)} of "
                f"{len(hashes)}; the task's encode gives an empty one for what is to be left out"
            )
        if not samples:
            return
        self.stored = self.stored or self._fields_of(samples[0])
        first = self.stored[0]
        held = [(each, key) for each, key in zip(samples, hashes) if np.size(each[first])]
        if not held:
            return
        for sequence in {self.fields[name].sequence for name in self.stored} - {None}:
            self._note_lengths(sequence, [each for each, _ in held])
        keys = [0] * len(held)
        for name in self.stored:
            values = [np.asarray(each[name]) for each, _ in held]
            self._append(name, values=values, field=self.fields[name])
            keys = [xxhash.xxh3_64_intdigest(v.tobytes(), seed=k) for v, k in zip(values, keys)]
        self._records.extend(key for _, key in held)
        self._samples.extend(keys)

    def _fields_of(self, sample: Sample) -> tuple[str, ...]:
        """Stored fields in the order of the fields. DataError when one is missing or unknown."""
        stored = tuple(name for name in self.fields if name in sample)
        made = set(DERIVED) if "input_ids" in sample else set()
        if len(stored) != len(sample) or set(self.fields) - set(stored) - made:
            raise DataError(
                f"{self.where}: expected samples with the fields {', '.join(self.fields)}, got "
                f"{', '.join(sample)}; the task's encode and its fields disagree"
            )
        return stored

    def _note_lengths(self, sequence: str | None, samples: Sequence[Sample]) -> None:
        assert sequence is not None, "asked for sequences only"
        names = [name for name in self.stored if self.fields[name].sequence == sequence]
        noted = self._lengths.setdefault(sequence, array("q"))
        for sample in samples:
            sizes = [_length(sample[name], self.fields[name]) for name in names]
            if len(set(sizes)) > 1:
                raise DataError(
                    f"{self.where}: {' and '.join(names)} must be equally long, one value for each "
                    f"of the {sequence}, got {sizes}"
                )
            noted.append(sizes[0])

    def _append(self, name: str, *, values: list[Array], field: Field) -> None:
        dim = field.ragged_dim
        inner = tuple(size for size in field.dims if size is not None)
        rows = [value[None] if dim is None else np.moveaxis(value, dim, 0) for value in values]
        wrong = next((value for value, row in zip(values, rows) if row.shape[1:] != inner), None)
        if wrong is not None:
            raise DataError(
                f"{self.where}: {name}: expected the shape {field.dims} (None is any), got "
                f"{wrong.shape}; make all samples alike before they are read"
            )
        whole = np.concatenate(rows)
        if field.dtype == "float32":
            largest = float(np.finfo(np.float32).max)
            smallest = -largest
        else:
            largest = np.iinfo(ON_DISK[field.dtype]).max
            smallest = min(field.fill, 0)
        if not (whole.min() >= smallest and whole.max() <= largest):
            raise DataError(
                f"{self.where}: {name} must lie in {smallest}..{largest}, got "
                f"{whole.min()}..{whole.max()}; is this the right tokenizer, or reader?"
            )
        with (self.scratch / f"all.{name}").open("ab") as file:
            whole.astype(ON_DISK[field.dtype]).tofile(file)

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def hashes(self) -> tuple[Hashes, Hashes]:
        """Of the record that each sample was made of, and of the sample's values [samples]."""
        return np.frombuffer(self._records, "u8"), np.frombuffer(self._samples, "u8")

    def lengths(self, sequence: str) -> Ints:
        """Positions of each sample along a sequence [samples]."""
        return np.frombuffer(self._lengths[sequence], dtype=np.int64)

    def open(self, name: str) -> Array:
        """All values of a field, mapped."""
        return open_values(self.scratch / f"all.{name}", field=self.fields[name])

    def remove(self) -> None:
        """Delete the scratch files."""
        for path in self.scratch.glob("all.*"):
            path.unlink()


def _length(value: Any, field: Field) -> int:
    return len(value) if field.ragged_dim == 0 else int(np.shape(value)[field.ragged_dim or 0])


def write_parts(
    samples: EncodedSamples,
    *,
    sequence_tokens: int,
    packing: bool,
    validation_fraction: float,
    seed: int,
) -> dict[str, Any]:
    """Write both parts beside the scratch files; the description of the source, JSON-able.

    Raises DataError when there are not enough samples to hold one out.
    """
    shape = Shape(
        sequence_tokens=sequence_tokens,
        packing=packing,
        fields=samples.fields,
        stored=samples.stored,
    )
    train, validation = split(samples, fraction=validation_fraction, seed=seed)
    content = xxhash.xxh3_128_hexdigest(np.sort(samples.hashes[1]).tobytes())
    folder = samples.scratch
    about = {
        part: _write_part(samples, part=part, order=order, shape=shape)
        for part, order in (("train", train), ("validation", validation))
        if len(order)
    }
    samples.remove()
    counts = _target_counts(folder, shape=shape)
    if counts is not None:
        counts.write(folder)
        for part in about:
            about[part]["targets"] = int(getattr(counts, part).sum())
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return {
        "shape": shape.to_json(),
        "content": content,
        "parts": about,
        **contents_of(folder),
    }


def split(samples: EncodedSamples, *, fraction: float, seed: int) -> tuple[Ints, Ints]:
    """Samples of the training and the validation part, each in the order they are stored.

    `fraction` 0 and 1: all in the one or the other. Both depend on what the samples hold, never on
    the order in which they were read. Held out: those whose record has the smallest keyed hash,
    whatever the seed and the tokenizer, so that every run of a study is judged on the same text,
    and a text that is there twice is on one side. The order of the rest is keyed by `seed`.
    """
    count, least = len(samples), 2 if 0 < fraction < 1 else 1
    if count < least:
        raise DataError(
            f"{samples.where}: holds {count} document(s); expected at least {least}"
            f"{', one of them to evaluate on' * (least - 1)}. Add text, or separate documents (two "
            "blank lines in a .txt, a line each in a .jsonl)"
        )
    records, values = samples.hashes
    shuffled = mixed(mixed(values ^ np.uint64(key_of("documents", seed))) ^ _occurrences(values))
    keys = mixed(records ^ np.uint64(key_of("validation")))
    ranked = np.lexsort((shuffled, keys))
    held = round(count * fraction)
    if 0 < fraction < 1:
        held = min(count - 1, max(1, held))
        # Up to where the text begins that the fraction would cut in two, unless it is the first.
        held = int(np.searchsorted(keys[ranked], keys[ranked[held]])) or held
    is_held = np.zeros(count, dtype=bool)
    is_held[ranked[:held]] = True
    order = np.argsort(shuffled, kind="stable")
    return order[~is_held[order]], order[is_held[order]]


def _occurrences(values: Hashes) -> Hashes:
    """How many equal values stand before each, so that equal samples do not lie side by side."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    found = np.empty_like(values)
    found[order] = np.arange(len(values)) - np.repeat(first, np.diff(np.append(first, len(values))))
    return found


def _write_part(samples: EncodedSamples, *, part: str, order: Ints, shape: Shape) -> dict[str, Any]:
    folder = samples.scratch
    chosen: dict[str | None, tuple[Ints, Ints]] = {None: (order, np.ones_like(order))}
    about = {"documents": len(order), "samples": len(order), "targets": len(order)}
    for sequence in shape.sequences:
        lengths = samples.lengths(sequence)
        starts = (np.cumsum(lengths) - lengths)[order]
        lengths = lengths[order]
        if sequence == "tokens" and not shape.packing:
            # One more than T: the last input of a language model has a target too.
            lengths = np.minimum(lengths, shape.sequence_tokens + int(shape.predicts_next))
        chosen[sequence] = (starts, lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
        offsets.tofile(folder / f"{part}.{sequence}.offsets")
        about[sequence] = int(offsets[-1])
        if shape.packing:
            rows = first_documents(offsets, shape=shape)
            rows.astype("<i8").tofile(folder / f"{part}.rows")
            about["samples"] = len(rows) - 1
    for name in shape.stored:
        source = samples.open(name)
        starts, lengths = chosen[shape.fields[name].sequence]
        size = max(1, int(np.prod(source.shape[1:])))
        with (folder / f"{part}.{name}").open("wb") as file:
            for index in _gather_indices(starts, lengths=lengths, most=_CHUNK_ELEMENTS // size):
                source[index].tofile(file)
    return about


def _gather_indices(starts: Ints, *, lengths: Ints, most: int) -> Iterator[Ints]:
    """Source indices of the positions of samples, in chunks of about `most`."""
    ends = np.cumsum(lengths)
    first = 0
    while first < len(starts):
        done = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + most, side="right")))
        counts = lengths[first:last]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        yield np.repeat(starts[first:last], counts) + within
        first = last


def _target_counts(folder: Path, *, shape: Shape) -> Counts | None:
    """How often each label is a target in each part; None where labels are no integers."""
    name = "input_ids" if shape.predicts_next else "labels"
    if not shape.fields.get(name, Field("float32", ())).dtype.startswith("int"):
        return None
    paths = {part: folder / f"{part}.{name}" for part in ("train", "validation")}
    parts = {
        part: open_values(path, field=shape.fields[name]).reshape(-1)
        for part, path in paths.items()
        if path.exists()
    }
    size = 1 + max(int(values.max(initial=0)) for values in parts.values())
    found = dict.fromkeys(paths, np.zeros(size, dtype=np.int64))
    for part, values in parts.items():
        counts = np.zeros(size, dtype=np.int64)
        for start in range(0, len(values), _CHUNK_ELEMENTS):
            chunk = values[start : start + _CHUNK_ELEMENTS]
            counts += np.bincount(chunk[chunk >= 0], minlength=size)
        if shape.predicts_next:  # a document's first token is no target
            offsets = np.fromfile(folder / f"{part}.tokens.offsets", dtype="<i8")
            counts -= np.bincount(values[offsets[:-1]], minlength=size)
        found[part] = counts
    return Counts(**found)
