"""Files of one host for another, over the guarded lines of their agents: asked piece by piece.

Nothing is kept before its size and hash are right; a source that gives other bytes is left, and the
next one is asked, for the whole file anew. No torch.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from shoal.checkpoint.disks import files_of, manifest_hash, save_damage
from shoal.checkpoint.manifest import NAME
from shoal.comm.keys import Keys
from shoal.comm.line import Line
from shoal.data.storage import appearing, damage
from shoal.environment import cache_directory
from shoal.errors import ChannelError, CheckpointError, FetchError
from shoal.launch import calls
from shoal.untrusted import is_plain_name, open_plain

PIECE_BYTES = 1 << 20
_UNDER_WAY = 4
_PATIENCE_SECONDS = 10.0
_LARGEST_BYTES = 1 << 40


def may_be_read(folder: Path, *, run: str) -> bool:
    """Whether hosts of `run` may have the files of a folder: its saves, and what the cache has."""
    saves = bool(run) and folder.resolve().parent == Path(run).resolve() / "checkpoints"
    return saves or is_cached(folder)


def is_cached(folder: Path) -> bool:
    """Whether a folder is one of this host's cache."""
    cache, place = cache_directory().resolve(), folder.resolve()
    return folder.is_absolute() and place.is_relative_to(cache) and place != cache


def piece(asked: calls.AskPiece, *, run: str) -> calls.Piece:
    """The answer to a peer: a part of a file, or why there is none."""
    folder, parts = Path(asked.folder), asked.file.split("/")
    if not may_be_read(folder, run=run) or not all(is_plain_name(part) for part in parts):
        return calls.Piece(offset=asked.offset, problem="is not for other hosts")
    try:
        with open_plain(folder / asked.file) as file:
            total = os.fstat(file.fileno()).st_size
            data = os.pread(file.fileno(), PIECE_BYTES, asked.offset)
    except OSError as error:
        return calls.Piece(offset=asked.offset, problem=str(error.strerror))
    return calls.Piece(offset=asked.offset, data=data, total=total)


class Source:
    """Another host's files. A context manager: leaving it ends the line."""

    def __init__(self, address: str, *, keys: Keys) -> None:
        """Raises FetchError for an address that cannot be one."""
        self.address, self.num_bytes = address.removeprefix("tcp://"), 0
        self._decoder = msgspec.msgpack.Decoder(calls.Piece)
        self._arrived: deque[calls.Piece] = deque()
        try:
            self._line = Line(address, keys=keys)
        except ChannelError as error:
            raise FetchError(str(error)) from None

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._line.close()

    def get(self, folder: Path, wanted: Wanted, *, into: Path) -> None:
        """Write a file of the peer's `folder` to `into`, a new file, and flush it.

        Raises FetchError for anything else than the bytes that are wanted, OSError of this host's
        disk.
        """
        where, digest = f"{folder / wanted.file} of {self.address}", wanted.hashes()
        size, at, asked = wanted.size, 0, 0
        with open(into, "xb") as file:
            while at < (1 if size is None else size):
                last = PIECE_BYTES if size is None else size
                while asked < last and asked - at < _UNDER_WAY * PIECE_BYTES:
                    self._ask(folder, wanted.file, offset=asked)
                    asked += PIECE_BYTES
                found = self._next(where)
                size = found.total if size is None else size
                if found.total != size or size > _LARGEST_BYTES:
                    raise FetchError(f"{where}: expected {size} bytes, got {found.total}")
                if found.offset != at or len(found.data) != min(PIECE_BYTES, size - at):
                    raise FetchError(f"{where}: other bytes than were asked for")
                file.write(found.data)
                digest.update(found.data)
                at += len(found.data)
                self.num_bytes += len(found.data)
                if not size:
                    break
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != wanted.hash:
            raise FetchError(f"{where}: its bytes are not those that were written")

    def _ask(self, folder: Path, name: str, *, offset: int) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._line.is_open:
            self._line.receive(timeout_seconds=0.1)
            if self._line.broken or self._line.num_refused or time.monotonic() > deadline:
                raise FetchError(f"{self.address}: does not answer")
        asked = calls.AskPiece(folder=str(folder), file=name, offset=offset)
        self._line.send(msgspec.msgpack.encode(asked))

    def _next(self, where: str) -> calls.Piece:
        """The next answer: those of one line come in the order in which they were asked for."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not self._arrived:
            for text in self._line.receive(timeout_seconds=0.2):
                try:
                    self._arrived.append(self._decoder.decode(text))
                except msgspec.DecodeError as error:
                    raise FetchError(f"{self.address}: not an answer: {error}") from None
            if not self._arrived and (self._line.broken or time.monotonic() > deadline):
                raise FetchError(f"{where}: went away meanwhile")
        found = self._arrived.popleft()
        if found.problem:
            raise FetchError(f"{where}: {found.problem}")
        return found


@dataclass(frozen=True)
class Wanted:
    """A file that is fetched. `size`: None where it is not known; `hashes`: what makes `hash`."""

    file: str
    size: int | None
    hash: str
    hashes: Callable[[], Any]


@dataclass
class Brought:
    """What came of it: bytes that were read from other hosts, and what is wrong, if anything."""

    num_bytes: int = 0
    refused: list[str] = field(default_factory=list)
    """Why sources were left."""
    damaged: list[str] = field(default_factory=list)
    """Manifests of saves on this disk whose files are not what they say."""

    def add(self, more: Brought) -> None:
        """What came of another one too."""
        self.num_bytes += more.num_bytes
        self.refused += more.refused


def bring_save(
    folder: Path, *, manifests: Sequence[str], sources: Sequence[str], keys: Keys
) -> Brought:
    """Make `folder` a whole save whose manifest has one of these hashes (xxh3_128).

    What is there already, to the last bit, stays. Raises FetchError where no source has it whole,
    with what was wrong with each.
    """

    def fill(source: Source, scratch: Path) -> None:
        problems = []
        for expected in manifests:
            known = Wanted(NAME, None, expected, xxhash.xxh3_128)
            try:
                source.get(folder, known, into=scratch / NAME)
            except FetchError as error:
                problems.append(str(error))
                (scratch / NAME).unlink(missing_ok=True)
                continue
            break
        else:
            raise FetchError(problems[-1])
        for each in files_of(scratch):
            wanted = Wanted(each.file, each.num_bytes, each.hash, xxhash.xxh3_64)
            source.get(folder, wanted, into=scratch / each.file)

    def is_whole(made: Path) -> bool:
        return manifest_hash(made) in manifests and not save_damage(made)

    return _bring(folder, fill=fill, is_whole=is_whole, sources=sources, keys=keys)


def bring_folder(
    folder: Path, contents: Mapping[str, Any], *, sources: Sequence[str], keys: Keys
) -> Brought:
    """Make `folder` what `contents` says (data/storage.py, `contents_of`). Raises FetchError."""

    def fill(source: Source, scratch: Path) -> None:
        for name, size in contents["files"].items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            wanted = Wanted(name, size, contents["hashes"][name], xxhash.xxh3_128)
            source.get(folder, wanted, into=scratch / name)

    def is_whole(made: Path) -> bool:
        return damage(made, dict(contents), hashed=True) is None

    return _bring(folder, fill=fill, is_whole=is_whole, sources=sources, keys=keys)


def _bring(
    folder: Path,
    *,
    fill: Callable[[Source, Path], None],
    is_whole: Callable[[Path], bool],
    sources: Sequence[str],
    keys: Keys,
) -> Brought:
    brought = Brought()
    if is_whole(folder):
        return brought
    for address in sources:
        try:
            with (
                appearing(folder, is_whole=is_whole, error=FetchError) as scratch,
                Source(address, keys=keys) as source,
            ):
                try:
                    fill(source, scratch)
                finally:
                    brought.num_bytes += source.num_bytes
        except (FetchError, CheckpointError) as error:
            brought.refused.append(str(error))
            continue
        return brought
    why = "".join(f"\n    {text}" for text in brought.refused)
    raise FetchError(f"{folder}: no host could give it{why}")
