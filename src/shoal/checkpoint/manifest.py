"""The manifest of a checkpoint: every file with its hash, every box with its place and hash.

The file is JSON whose first field is a checksum of all its other bytes, so that a change of any
byte, white space included, is noticed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from shoal.checkpoint.boxes import Box
from shoal.errors import CheckpointError

NAME = "manifest.json"
FORMAT = 1
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
    """What one rank wrote."""

    files: tuple[FileRecord, ...] = ()
    entries: tuple[Entry, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data, read back by `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Part:
        """The inverse of `to_json`."""
        return cls(
            tuple(FileRecord(**file) for file in tree["files"]),
            tuple(_entry(entry) for entry in tree["entries"]),
        )


def _entry(tree: dict[str, Any]) -> Entry:
    box = Box(tuple(tree["box"]["offsets"]), tuple(tree["box"]["sizes"]))
    return Entry(**{**tree, "shape": tuple(tree["shape"]), "box": box})


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
    def read(cls, folder: Path) -> Manifest:
        """The manifest of the checkpoint in `folder`. Raises CheckpointError."""
        path = folder / NAME
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        start, stop = len(_HEAD), len(_HEAD) + len(_BLANK)
        found = content[start:stop]
        blanked = content[:start] + _BLANK.encode() + content[stop:]
        expected = xxhash.xxh3_64(blanked).hexdigest().encode()
        if found != expected:
            raise CheckpointError(f"{path}: damaged (its checksum does not match its content)")
        body = json.loads(content)["body"]
        if body["format"] != FORMAT:
            raise CheckpointError(
                f"{path}: expected format {FORMAT}, got {body['format']}; "
                "read it with the version of shoal that wrote it"
            )
        return cls(body["step"], Part.from_json(body), body["state"])
