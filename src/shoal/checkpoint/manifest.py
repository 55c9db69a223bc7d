"""The manifest of a checkpoint: every file with its hash, every box with its position and hash.

The file is JSON whose first field is a checksum of all its other bytes, so that a change of any
byte, white space included, is noticed. The checksum is no signature: what a manifest says is
checked before it is used, for it may have been made by anybody.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from shoal.boxes import Box
from shoal.errors import CheckpointError
from shoal.untrusted import MOST_DIMS, MOST_ELEMENTS, MOST_TENSORS, is_plain_name, open_plain

NAME = "manifest.json"
FORMAT = 1
LARGEST_BYTES = 1 << 28
_HEAD = '{"checksum": "'
_BLANK = "0" * 16


@dataclass(frozen=True)
class Entry:
    """One saved box: which tensor, which part of it, in which file under which key."""

    name: str
    kind: str
    """parameter, or the name of an optimizer state."""
    shape: tuple[int, ...]
    box: Box
    file: str
    key: str
    hash: str


@dataclass(frozen=True)
class FileRecord:
    """One file: its size and the xxh3 hash of all its bytes."""

    file: str
    num_bytes: int
    hash: str


@dataclass(frozen=True)
class Part:
    """What one rank wrote, or all of them."""

    files: tuple[FileRecord, ...] = ()
    entries: tuple[Entry, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence[Part]) -> Part:
        """All of them, in their order."""
        files = tuple(file for part in parts for file in part.files)
        return cls(files, tuple(entry for part in parts for entry in part.entries))

    def to_json(self) -> dict[str, Any]:
        """Plain data, read back by `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Any) -> Part:
        """The inverse of `to_json`. Raises ValueError for what cannot be a part."""
        part = msgspec.convert(tree, type=cls)  # its ValidationError is a ValueError
        problem = _problem(part)
        if problem is not None:
            raise ValueError(problem)
        return part


def _problem(part: Part) -> str | None:
    """What is wrong with a part: names that lead elsewhere, boxes outside of their tensor."""
    files = {record.file for record in part.files}
    for name in sorted(files):
        if not is_plain_name(name) or not name.endswith(".safetensors"):
            return f"{name[:80]!r} cannot be a file of a checkpoint"
    if len(files) != len(part.files) or len(part.entries) > MOST_TENSORS:
        return "a file stands there twice, or too many boxes"
    taken: set[tuple[str, str]] = set()
    for entry in part.entries:
        where, box = entry.name[:80], entry.box
        dims = {len(entry.shape), len(box.offsets), len(box.sizes)}
        if len(dims) > 1 or max(dims) > MOST_DIMS or prod(entry.shape) > MOST_ELEMENTS:
            return f"{where}: no tensor has the shape {str(entry.shape)[:80]}"
        for size, low, count in zip(entry.shape, box.offsets, box.sizes):
            if low < 0 or count < 0 or low + count > size:
                return f"{where}: its box lies outside of it"
        if entry.file not in files:
            return f"{where}: is in {entry.file[:80]!r}, which is no file of this checkpoint"
        if (entry.file, entry.key) in taken:
            return f"{where}: shares its bytes with another box"
        taken.add((entry.file, entry.key))
    return None


@dataclass(frozen=True)
class Manifest:
    """All parts of one checkpoint, and the small state that goes with them."""

    step: int
    part: Part
    state: dict[str, Any] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The file's content, checksum in place."""
        body = {"format": FORMAT, "step": self.step, **self.part.to_json(), "state": self.state}
        rest = '",\n"body": ' + json.dumps(body, sort_keys=True) + "}\n"
        checksum = xxhash.xxh3_64((_HEAD + _BLANK + rest).encode()).hexdigest()
        return (_HEAD + checksum + rest).encode()

    @classmethod
    def newest(cls, checkpoints: Path) -> Manifest | None:
        """The newest manifest in a run's folder of checkpoints that can be read, if any."""
        folders = checkpoints.glob("step-*")
        for folder in sorted(folders, key=lambda path: (len(path.name), path.name), reverse=True):
            with suppress(CheckpointError):
                return cls.read(folder)
        return None

    @classmethod
    def read(cls, folder: Path, *, step: int | None = None) -> Manifest:
        """The manifest of the checkpoint in `folder`, of `step` if given. CheckpointError."""
        return cls.of(_content(folder / NAME), at=folder / NAME, step=step)

    @classmethod
    def of(cls, content: bytes, *, at: Path | str, step: int | None = None) -> Manifest:
        """What `to_bytes` has written, from the place `at`. Raises CheckpointError."""
        start, stop = len(_HEAD), len(_HEAD) + len(_BLANK)
        found = content[start:stop]
        blanked = content[:start] + _BLANK.encode() + content[stop:]
        expected = xxhash.xxh3_64(blanked).hexdigest().encode()
        if found != expected:
            raise CheckpointError(f"{at}: damaged (its checksum does not match its content)")
        try:
            body = json.loads(content)["body"]
            if body["format"] != FORMAT:
                raise CheckpointError(
                    f"{at}: expected format {FORMAT}, got {body['format']}; "
                    "read it with the version of shoal that wrote it"
                )
            part = Part.from_json({"files": body["files"], "entries": body["entries"]})
            state = msgspec.convert(body["state"], type=dict[str, Any])
            manifest = cls(msgspec.convert(body["step"], type=int), part, state)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            raise CheckpointError(f"{at}: refused, it is not a manifest: {reason}") from None
        if step is not None and manifest.step != step:
            raise CheckpointError(f"{at}: is of step {manifest.step}, expected {step}")
        return manifest


def _content(path: Path) -> bytes:
    """The bytes of a manifest. Raises CheckpointError."""
    if path.parent.is_symlink():
        raise CheckpointError(f"{path.parent}: is a link, expected the folder of a checkpoint")
    try:
        with open_plain(path) as file:
            content = file.read(LARGEST_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > LARGEST_BYTES:
        raise CheckpointError(f"{path}: larger than any manifest ({LARGEST_BYTES} bytes)")
    return content


def verify_file(path: Path, record: FileRecord) -> None:
    """Check every byte of a file. Raises CheckpointError that names it."""
    try:
        digest = xxhash.xxh3_64()
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.num_bytes:
                raise CheckpointError(f"{path}: expected {record.num_bytes} bytes, got {size}")
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if digest.hexdigest() != record.hash:
        raise CheckpointError(f"{path}: damaged (its hash does not match the manifest)")
