"""Checkpoints on disk: atomic, verified, readable box by box. Knows names, boxes and bytes only.

RUN/checkpoints/step-00000100/ holds one safetensors file per writer and a manifest. Writers work
in a hidden folder; the manifest is written last and one rename publishes the whole. What has the
final name is therefore complete; hashes tell whether it still is. Where a registry says which saves
count, the rename is its coordinator's (checkpoint/folders.py).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shoal.boxes import Box, Piece
from shoal.checkpoint.files import Files
from shoal.checkpoint.folders import (
    divided_name,
    divided_saves,
    publish,
    published_name,
    published_steps,
    waiting_name,
)
from shoal.checkpoint.manifest import NAME, Entry, FileRecord, Manifest, Part, verify_file
from shoal.errors import CheckpointError, RunError
from shoal.untrusted import TensorInfo, open_plain, read_header

_WRITING = re.compile(r"\.step-(\d{8,})\.((?:g(\d+)-)?[0-9a-f]+)\.writing")

_DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


def _bytes_of(tensor: Tensor) -> memoryview:
    plain = tensor.detach().to("cpu").contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data


def _key(piece: Piece[Tensor]) -> str:
    """Name inside the file; a part of a tensor carries its offsets, for a rank may hold several."""
    name = f"{piece.kind}/{piece.name}"
    if piece.box == Box.whole(piece.shape):
        return name
    return f"{name}[{','.join(map(str, piece.box.offsets))}]"


def _header(pieces: list[tuple[str, Piece[Tensor]]]) -> bytes:
    """The safetensors header (https://github.com/huggingface/safetensors#format)."""
    header: dict[str, Any] = {}
    at = 0
    for key, piece in pieces:
        size = piece.tensor.numel() * piece.tensor.element_size()
        header[key] = {
            "dtype": _DTYPES[piece.tensor.dtype],
            "shape": list(piece.tensor.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Store:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, *, files: Files | None = None) -> None:
        self.folder = folder
        self.files = files or Files()
        self.best: int | None = None
        """A step that is kept whatever else is."""
        self.tell: Callable[[float], None] = lambda share: None
        """Called now and then while a save is brought to where it is read; `share` of 1 is."""

    look_seconds = 0.02
    """How long at most between two looks at what another rank writes."""

    patience_seconds = 60.0
    """How long the next save waits for this one, before it is left out."""
    divided = False
    """Whether hosts save each what its ranks hold, so that none has all of it but at a start."""
    away_seconds = 0.0
    """How long the last save of a run is tried again where the store does not answer."""

    @property
    def appear_seconds(self) -> float:
        """How long others may take to give a save its name, and to bring what they have of it."""
        return 600.0 if self.divided else 30.0

    @property
    def place(self) -> str:
        """Where the checkpoints are, for messages."""
        return str(self.folder)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of `step`."""
        return self.folder / published_name(step)

    def writing(self, step: int, *, token: str = "") -> Path:
        """The hidden folder in which the save of `step` is made; `token` tells attempts apart."""
        return self.folder / f".step-{step:08d}{token and '.'}{token}.writing"

    def steps(self) -> list[int]:
        """Steps that have a published checkpoint, oldest first."""
        return published_steps(self.folder)

    def wait_for(self, step: int) -> None:
        """Wait until the save of `step` has its name, which may be somebody else's to give."""
        deadline = time.monotonic() + self.appear_seconds
        while not self.path(step).is_dir() and time.monotonic() < deadline:
            time.sleep(0.02)

    # --- writing

    def begin(self, step: int) -> None:
        """Make room for a save; what an interrupted one left behind goes. One rank calls it."""
        self.files.make(self.folder)
        self.clear()
        self.files.make(self.writing(step))

    def prepare(self, step: int, *, rank: int, token: str, generation: int) -> None:
        """Make room for this rank's part. Raises OSError."""
        self.files.make(self.writing(step, token=token))
        if rank == 0:
            self.clear(token=token, step=step, generation=generation)

    def clear(self, *, token: str = "", step: int = 0, generation: int = 0) -> None:
        """Remove what interrupted saves left behind. Raises OSError.

        With a `token`, what this attempt writes for `step` or later stays; with a `generation`,
        what later ones write.
        """
        for leftover in self.folder.glob(".step-*"):
            match = _WRITING.fullmatch(leftover.name)
            if match and token and match[2] == token and int(match[1]) >= step:
                continue
            if match and generation and int(match[3] or 0) > generation:
                continue  # this rank was cut off meanwhile
            self.files.remove(leftover)

    def write_part(
        self, step: int, *, rank: int, pieces: Iterable[Piece[Tensor]], token: str = ""
    ) -> Part:
        """Write this rank's `pieces` to one file and flush it. Raises OSError."""
        keyed = [(_key(piece), piece) for piece in pieces]
        if not keyed:
            return Part()
        name = self._part_name(rank, token=token)
        entries: list[Entry] = []

        def content() -> Iterable[bytes | memoryview]:
            yield _header(keyed)
            for key, piece in keyed:
                data = _bytes_of(piece.tensor)
                digest = xxhash.xxh3_64(data).hexdigest()
                entries.append(
                    Entry(piece.name, piece.kind, piece.shape, piece.box, name, key, digest)
                )
                yield data

        size, digest = self._write(step, name, content(), token=token)
        return Part((FileRecord(name, size, digest),), tuple(entries))

    def _part_name(self, rank: int, *, token: str) -> str:
        return f"rank-{rank:05d}.safetensors"

    def _write(
        self, step: int, name: str, content: Iterable[bytes | memoryview], *, token: str
    ) -> tuple[int, str]:
        return self.files.write(self.writing(step, token=token) / name, content)

    def publish(
        self,
        step: int,
        *,
        parts: list[Part],
        state: dict[str, Any],
        keep: int,
        token: str = "",
        generation: int = 0,
        host: int | None = None,
    ) -> Path:
        """Write the manifest, give the checkpoint its name, then drop the oldest beyond `keep`.

        With a `generation` a registry says which saves count: this one waits for it, and nothing
        goes (checkpoint/folders.py). `host`: of those of the generation, whose boxes these are.
        Returns its folder, as it is called now. Raises OSError.
        """
        manifest = Manifest(step, Part.joined(parts), state)
        writing = self.writing(step, token=token)
        self.files.write(writing / NAME, [manifest.to_bytes()])
        if generation:
            waiting = self.folder / waiting_name(step, generation=generation)
            if host is not None:
                waiting = self.folder / divided_name(step, generation=generation, host=host)
                if waiting.exists():  # an earlier start's, which does not count
                    self.files.remove(waiting)
            self.files.rename(writing, waiting)
            return waiting
        kept = [] if self.best is None else [self.best]
        return publish(self.folder, writing, step=step, keep=keep, kept=kept, files=self.files)

    def abandon(self, step: int, *, token: str) -> None:
        """Give the room of a save back that comes to nothing. Raises OSError."""
        self.files.remove(self.writing(step, token=token))

    # --- where ranks meet: a report beside each part, once that is there

    def put_report(self, step: int, content: bytes, *, rank: int, token: str) -> None:
        """Leave what rank 0 waits for; empty where there is no room for more. Raises OSError."""
        path = self._report(step, rank=rank, token=token)
        if content:
            self.files.put(path, content)
        else:
            path.touch()

    def report(self, step: int, *, rank: int, token: str) -> bytes | None:
        """What a rank has left; None: nothing yet. Raises OSError."""
        path = self._report(step, rank=rank, token=token)
        return path.read_bytes() if path.exists() else None

    def drop_reports(self, step: int, *, ranks: Iterable[int], token: str) -> None:
        """They do not belong to the checkpoint. Raises OSError."""
        for rank in ranks:
            self.files.remove(self._report(step, rank=rank, token=token))

    def size(self, step: int, file: str, *, token: str) -> int | None:
        """Bytes of a file that a rank has written; None: `publish` looks. Raises OSError."""
        return (self.writing(step, token=token) / file).stat().st_size

    def _report(self, step: int, *, rank: int, token: str) -> Path:
        return self.writing(step, token=token) / f"rank-{rank:05d}.report"

    # --- reading

    def verify(self, step: int) -> Manifest:
        """Check every byte of a checkpoint. Raises CheckpointError that names the file."""
        folder = self.path(step)
        manifest = Manifest.read(folder, step=step)
        for record in manifest.part.files:
            verify_file(folder / record.file, record)
        return manifest

    def newest_good(self, *, on_bad: Callable[[int, str], None]) -> int:
        """The newest step whose checkpoint is whole; `on_bad(step, reason)` for each passed over.

        Raises RunError when there is none.
        """
        steps = self.steps()
        reasons: list[str] = []
        for step in reversed(steps):
            try:
                self.verify(step)
            except CheckpointError as error:
                reasons.append(str(error))
                on_bad(step, str(error))
            else:
                return step
        if not steps and divided_saves(self.folder):
            raise RunError(
                f"{self.place}: has what one host has saved, and not the other hosts' boxes; go on "
                "over the hosts (shoal launch hosts ... --go-on)"
            )
        if not steps:
            raise RunError(f"{self.place}: no checkpoint here; nothing to resume from")
        listed = "\n  ".join(reasons)
        raise RunError(f"{self.place}: no checkpoint can be trusted:\n  {listed}")

    def open(self, step: int) -> Reader:
        """A reader of the checkpoint of `step` (verified file by file as it is read)."""
        return Reader(self.path(step), Manifest.read(self.path(step), step=step))


class Reader:
    """Reads any box of any tensor of one checkpoint, whatever boxes it was saved in."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.step, self.state = folder, manifest.step, manifest.state
        self.run = folder.parent.parent
        """Where the rows of the run are, if they are anywhere."""
        self._headers: dict[str, dict[str, TensorInfo]] = {}
        self._entries: dict[tuple[str, str], list[Entry]] = {}
        for entry in manifest.part.entries:
            self._entries.setdefault((entry.kind, entry.name), []).append(entry)

    def names(self, kind: str = "parameter") -> list[str]:
        """Names saved under `kind`, in the order saved."""
        return [name for found, name in self._entries if found == kind]

    def shape(self, name: str, *, kind: str = "parameter") -> tuple[int, ...]:
        """Global shape. Raises CheckpointError for a name that is not there."""
        return self._of(kind, name)[0].shape

    def _of(self, kind: str, name: str) -> list[Entry]:
        try:
            return self._entries[kind, name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: holds no {kind} of {name}") from None

    def read(self, name: str, *, kind: str = "parameter", box: Box | None = None) -> Tensor:
        """The tensor, or a `box` of it; each saved box that is touched whole is hash-checked.

        Nothing is allocated before the boxes that are there make up what is asked for. Raises
        CheckpointError.
        """
        entries = self._of(kind, name)
        wanted = box or Box.whole(entries[0].shape)
        found = [
            (entry, wanted.intersection(entry.box) if wanted.sizes else entry.box)
            for entry in entries
        ]
        shared = [(entry, part) for entry, part in found if part is not None]
        filled = sum(part.numel for _, part in shared)
        if not shared or filled != wanted.numel:
            raise CheckpointError(
                f"{self.folder}: {kind} of {name}: the saved boxes hold {filled} of "
                f"{wanted.numel} elements asked for"
            )
        for entry, _ in shared:
            self._check(entry)
        if len(shared) == 1 and shared[0][1] == wanted:
            return self._read(*shared[0])
        parts = [(part, self._read(entry, part)) for entry, part in shared]
        if len({tensor.dtype for _, tensor in parts}) > 1:
            raise CheckpointError(f"{self.folder}: {kind} of {name}: its boxes differ in dtype")
        result = torch.empty(wanted.sizes, dtype=parts[0][1].dtype)
        seen = torch.zeros(wanted.sizes, dtype=torch.bool)
        for part, tensor in parts:
            at = part.within(wanted)
            result[at], seen[at] = tensor, True
        if not seen.all():
            raise CheckpointError(f"{self.folder}: {kind} of {name}: its saved boxes overlap")
        return result

    def _check(self, entry: Entry) -> None:
        """What the file's header says of a box is what the manifest says. CheckpointError."""
        path = self.folder / entry.file
        try:
            if entry.file not in self._headers:
                with open_plain(path) as file:
                    self._headers[entry.file] = read_header(file)
            info = self._headers[entry.file].get(entry.key)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise CheckpointError(f"{path}: damaged: {error}") from None
        if info is None or info.shape != entry.box.sizes or info.dtype not in _DTYPES.values():
            has = "nothing" if info is None else f"{info.dtype} {list(info.shape)}"
            raise CheckpointError(
                f"{path}: {entry.key}: expected a box of {list(entry.box.sizes)}, found {has}"
            )

    def _read(self, entry: Entry, shared: Box) -> Tensor:
        path = self.folder / entry.file
        try:
            with safe_open(path, framework="pt") as file:
                if shared == entry.box:
                    whole: Tensor = file.get_tensor(entry.key)
                    if xxhash.xxh3_64(_bytes_of(whole)).hexdigest() != entry.hash:
                        raise CheckpointError(f"{path}: {entry.key}: damaged (hash differs)")
                    return whole
                part: Tensor = file.get_slice(entry.key)[shared.within(entry.box)]
                return part
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
