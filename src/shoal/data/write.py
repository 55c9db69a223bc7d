"""Writes token files: documents as they come, then split, ordered and cut into parts."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.data.pack import Shape, first_documents
from shoal.data.permutation import key_of, permute
from shoal.data.unigram import Counts
from shoal.errors import DataError

Ints = npt.NDArray[np.int64]
_CHUNK_TOKENS = 1 << 22
_LARGEST_ID = 2**31 - 1


class EncodedDocuments:
    """Token ids of all documents of a source in its own order, spilled to scratch files."""

    def __init__(self, scratch: Path, *, where: str) -> None:
        self.scratch = scratch
        self.where = where
        self.tagged: bool | None = None
        self._lengths = array("q")

    def add(self, encoded: list[dict[str, list[int]]]) -> None:
        """Append documents. Raises DataError for ids out of range or labels that do not fit."""
        encoded = [document for document in encoded if document["input_ids"]]
        if not encoded:
            return
        tagged = "labels" in encoded[0]
        self._append("tokens", lists=[document["input_ids"] for document in encoded], smallest=0)
        if tagged:
            for document in encoded:
                if len(document["labels"]) != len(document["input_ids"]):
                    raise DataError(f"{self.where}: expected one label per token")
            self._append(
                "labels", lists=[document["labels"] for document in encoded], smallest=-100
            )
        self.tagged = tagged
        self._lengths.extend(len(document["input_ids"]) for document in encoded)

    def _append(self, kind: str, *, lists: list[list[int]], smallest: int) -> None:
        ids = np.concatenate([np.asarray(values, dtype=np.int64) for values in lists])
        if ids.min() < smallest or ids.max() > _LARGEST_ID:
            raise DataError(
                f"{self.where}: {kind} must lie in {smallest}..{_LARGEST_ID}, got "
                f"{ids.min()}..{ids.max()}; is this the right tokenizer?"
            )
        with (self.scratch / f"all.{kind}").open("ab") as file:
            ids.astype("<i4").tofile(file)

    @property
    def lengths(self) -> Ints:
        """Tokens of each document [documents]."""
        return np.frombuffer(self._lengths, dtype=np.int64) if self._lengths else np.empty(0, "i8")

    def open(self, kind: str) -> npt.NDArray[np.int32]:
        """All `tokens` or `labels`, mapped."""
        return np.memmap(self.scratch / f"all.{kind}", dtype="<i4", mode="r")

    def remove(self) -> None:
        """Delete the scratch files."""
        for path in self.scratch.glob("all.*"):
            path.unlink()


def write_parts(
    documents: EncodedDocuments,
    *,
    sequence_tokens: int,
    packing: bool,
    validation_fraction: float,
    seed: int,
) -> dict[str, Any]:
    """Write both parts beside the scratch files; the description of the source, JSON-able.

    Raises DataError when there are not enough documents to hold one out.
    """
    shape = Shape(sequence_tokens=sequence_tokens, packing=packing, tagged=bool(documents.tagged))
    train, validation = split(
        len(documents.lengths), fraction=validation_fraction, seed=seed, where=documents.where
    )
    folder = documents.scratch
    about = {
        "train": _write_part(documents, part="train", order=train, shape=shape),
        "validation": _write_part(documents, part="validation", order=validation, shape=shape),
    }
    documents.remove()
    kind = "labels" if shape.tagged else "tokens"
    counts = Counts(*(_target_counts(folder, part=part, kind=kind) for part in about))
    counts.write(folder)
    for part, count in zip(about, (counts.train, counts.validation)):
        about[part]["targets"] = int(count.sum())
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return {
        "shape": asdict(shape),
        "parts": about,
        "vocabulary_size": 1 + max(_largest(folder, part=part, kind="tokens") for part in about),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }


def split(count: int, *, fraction: float, seed: int, where: str) -> tuple[Ints, Ints]:
    """Documents of the training and the validation part, each in the order they are stored.

    Held out: those that a keyed shuffle puts first, whatever the seed, so that every run of a
    study is judged on the same text. The order of the rest is keyed by `seed`.
    """
    if count < 2:
        raise DataError(
            f"{where}: holds {count} document(s); expected at least 2, one of them to evaluate on. "
            f"Add text, or separate documents (two blank lines in a .txt, a line each in a .jsonl)"
        )
    held = min(count - 1, max(1, round(count * fraction)))
    places = permute(np.arange(count), size=count, key=key_of("validation"))
    order = permute(np.arange(count), size=count, key=key_of("documents", seed))
    return order[places[order] >= held], order[places[order] < held]


def _write_part(
    documents: EncodedDocuments, *, part: str, order: Ints, shape: Shape
) -> dict[str, Any]:
    folder = documents.scratch
    starts = np.concatenate([[0], np.cumsum(documents.lengths)])[:-1][order]
    lengths = documents.lengths[order]
    if not shape.packing:
        # One more than T: the last input of a language model has a target too.
        lengths = np.minimum(lengths, shape.sequence_tokens + (0 if shape.tagged else 1))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
    offsets.tofile(folder / f"{part}.offsets")
    for kind in ("tokens", "labels") if shape.tagged else ("tokens",):
        source = documents.open(kind)
        with (folder / f"{part}.{kind}").open("wb") as file:
            for index in _gather_indices(starts, lengths=lengths):
                source[index].tofile(file)
    samples = len(order)
    if shape.packing:
        rows = first_documents(offsets, shape=shape)
        rows.astype("<i8").tofile(folder / f"{part}.rows")
        samples = len(rows) - 1
    return {"documents": len(order), "samples": samples, "tokens": int(offsets[-1])}


def _gather_indices(starts: Ints, *, lengths: Ints) -> Iterator[Ints]:
    """Source indices of the tokens of documents, in chunks of bounded memory."""
    ends = np.cumsum(lengths)
    first = 0
    while first < len(starts):
        done = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + _CHUNK_TOKENS, side="right")))
        counts = lengths[first:last]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        yield np.repeat(starts[first:last], counts) + within
        first = last


def _chunks(folder: Path, *, part: str, kind: str) -> Iterator[npt.NDArray[np.int32]]:
    file = np.memmap(folder / f"{part}.{kind}", dtype="<i4", mode="r")
    for start in range(0, len(file), _CHUNK_TOKENS):
        yield file[start : start + _CHUNK_TOKENS]


def _largest(folder: Path, *, part: str, kind: str) -> int:
    return max(int(chunk.max()) for chunk in _chunks(folder, part=part, kind=kind))


def _target_counts(folder: Path, *, part: str, kind: str) -> Ints:
    """How often each id is a target: every labelled token; every token but a document's first."""
    size = 1 + max(_largest(folder, part=each, kind=kind) for each in ("train", "validation"))
    size = max(size, 1)  # tags may be absent from every position
    counts = np.zeros(size, dtype=np.int64)
    for chunk in _chunks(folder, part=part, kind=kind):
        counts += np.bincount(chunk[chunk >= 0], minlength=size)
    if kind == "tokens":
        offsets = np.fromfile(folder / f"{part}.offsets", dtype="<i8")
        tokens = np.memmap(folder / f"{part}.tokens", dtype="<i4", mode="r")
        counts -= np.bincount(tokens[offsets[:-1]], minlength=size)
    return counts
