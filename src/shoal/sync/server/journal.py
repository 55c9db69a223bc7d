"""What a server has promised, on disk: a snapshot of its parts, and the events since then.

An event is a line of msgpack and the bytes of its tensor, with a hash over both; what a kill has
left of the last one was never acknowledged, and is cut off. When the log has grown beyond its bound
the parts are saved whole, and a new log begins: the disk holds two snapshots and a log at most.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import msgspec
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from shoal.comm.wire import DTYPES, NAMES, bytes_of
from shoal.sync.server.part import Part

_HEAD = struct.Struct("<IQQ")
"""Bytes of the event, bytes of its tensor, xxh3 of both."""
LEAST_LOG_BYTES = 64 << 20
LOG_PER_STATE = 4
"""A log may be so many times as large as the state."""

Event = dict[str, Any]


def hash_both(event: bytes, data: memoryview | bytes | bytearray) -> int:
    """64 bits over an event and its tensor."""
    total = xxhash.xxh3_64(event)
    total.update(data)
    return total.intdigest()


class Journal:
    """One server's folder. `note`, then `sync` before an acknowledgement; `snapshot` when due."""

    def __init__(self, folder: Path, *, least_log_bytes: int = LEAST_LOG_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._least = folder, least_log_bytes
        self._number = 0
        self._log: IO[bytes] | None = None
        self._dirty = False
        self._state_bytes = 0

    # --- writing

    def note(self, event: Event, tensor: Tensor | None = None) -> None:
        """Append an event; it counts after `sync`. Raises OSError."""
        if self._log is None:
            return  # nothing is filled yet: the first snapshot will hold it
        text = msgspec.msgpack.encode(
            {**event, "dtype": None if tensor is None else NAMES[tensor.dtype]}
        )
        data: memoryview | bytes = b"" if tensor is None else bytes_of(tensor)
        self._log.write(_HEAD.pack(len(text), len(data), hash_both(text, data)))
        self._log.write(text)
        self._log.write(data)
        self._dirty = True

    def sync(self) -> None:
        """Everything noted is on the disk. Raises OSError."""
        if self._log is not None and self._dirty:
            self._log.flush()
            os.fdatasync(self._log.fileno())
        self._dirty = False

    @property
    def is_due(self) -> bool:
        """Whether the log has grown beyond its bound."""
        limit = max(self._least, LOG_PER_STATE * self._state_bytes)
        return self._log is not None and self._log.tell() > limit

    def snapshot(self, parts: Mapping[int, Part]) -> None:
        """Save all parts, and begin a new log. Raises OSError."""
        self._number += 1
        numbers: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for position, part in parts.items():
            if part.filled:
                numbers[str(position)], own = part.kept()
                tensors |= {f"{position}:{name}": each for name, each in own.items()}
        self._state_bytes = sum(each.nbytes for each in tensors.values())
        beside, path = self._state(self._number).with_suffix(".new"), self._state(self._number)
        _write(beside, save(tensors, metadata={"parts": json.dumps(numbers)}))
        if self._log is not None:
            self._log.close()
        self._log = self._log_path(self._number).open("wb")
        beside.replace(path)
        self._flush_folder()
        for old in (*self._folder.glob("state-*"), *self._folder.glob("log-*")):
            if old not in (path, self._log_path(self._number)):
                old.unlink()

    def close(self) -> None:
        """Nothing follows."""
        if self._log is not None:
            self.sync()
            self._log.close()
            self._log = None

    # --- reading

    def recover(self, make: Callable[[Mapping[str, Any]], Part]) -> dict[int, Part]:
        """The parts as they were when the last acknowledged event was written; none at a start.

        `make`: an empty part of these numbers. Raises OSError.
        """
        for path in sorted(self._folder.glob("state-*.safetensors"), reverse=True):
            number = int(path.stem.partition("-")[2])
            try:
                parts = self._read_state(path, make)
            except (SafetensorError, ValueError, KeyError):
                continue  # damaged: the one before it may be there still
            log = self._log_path(number)
            end = 0
            for event, tensor, behind in read_events(log):
                replay(parts[event["position"]], event, tensor)
                end = behind
            self._number = number
            self._log = log.open("r+b" if log.exists() else "w+b")
            self._log.truncate(end)
            self._log.seek(end)
            self._state_bytes = path.stat().st_size
            return parts
        return {}

    def _read_state(self, path: Path, make: Callable[[Mapping[str, Any]], Part]) -> dict[int, Part]:
        parts: dict[int, Part] = {}
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            described = json.loads(file.metadata()["parts"])
        for position, numbers in described.items():
            own = f"{position}:"
            parts[int(position)] = part = make(numbers)
            named = {n.removeprefix(own): t for n, t in tensors.items() if n.startswith(own)}
            part.restore(numbers, named)
        return parts

    def _state(self, number: int) -> Path:
        return self._folder / f"state-{number:06d}.safetensors"

    def _log_path(self, number: int) -> Path:
        return self._folder / f"log-{number:06d}.bin"

    def _flush_folder(self) -> None:
        handle = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_events(path: Path) -> Iterator[tuple[Event, Tensor | None, int]]:
    """The whole events of a log, each with its tensor and the offset behind it."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            length, size, wanted = _HEAD.unpack(head)
            if length + size > path.stat().st_size:
                return
            text, data = file.read(length), bytearray(file.read(size))
            if (len(text), len(data)) != (length, size) or hash_both(text, data) != wanted:
                return
            event = msgspec.msgpack.decode(text)
            dtype = event.pop("dtype")
            tensor = torch.frombuffer(data, dtype=DTYPES[dtype]) if dtype and data else None
            yield event, tensor, file.tell()


def replay(part: Part, event: Event, tensor: Tensor | None) -> None:
    """Let an event happen to a part again."""
    kind, rest = event["event"], {k: v for k, v in event.items() if k not in ("event", "position")}
    if kind == "push":
        part.push(rest.pop("replica"), tensor, **rest)
    elif kind == "join":
        part.join(rest["replica"], life=rest["life"])
    elif kind == "leave":
        part.leave(rest["replica"])
    elif kind == "finish":
        part.finish(rest["replica"])
    elif kind == "close":
        part.close()
    elif kind == "stop":
        part.stop(rest["replica"])
    elif kind == "pull":
        part.pull(rest["replica"])


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
