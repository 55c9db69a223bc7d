"""The pulse of a worker: what it does right now, in shared memory, for who watches from outside.

The step loop itself writes it (a side thread would go on beating while the loop hangs), at every
phase and every collective, with the monotonic clock, which all processes of a machine share. A
watcher reads it without the worker's help: also when the worker is stopped or holds the
interpreter lock.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_SLOT = struct.Struct("<QddqqQqq32s24s")
"""version (odd while written), beat, expected, step, collective, bytes, generation, rank, phase,
operation."""
SLOT_BYTES = 256


@dataclass(frozen=True)
class Beat:
    """One worker as last seen."""

    beat_at: float
    """time.monotonic() of the last sign."""
    expected_seconds: float
    """How long the phase it is in has lately taken, or the longest of its parts between
    collectives; 0 until it was through it once."""
    step: int
    collective: int
    """Collectives entered so far in this generation."""
    num_bytes: int
    """Of the collective it is in, and of those that go on beside it."""
    generation: int
    rank: int
    phase: str
    operation: str
    """The collective it is in, or empty."""

    @property
    def where(self) -> str:
        """In words."""
        text = f"step {self.step}, {self.phase}"
        if self.operation:
            text += f", in collective {self.collective} ({self.operation}, {self.num_bytes} bytes)"
        return text


class Pulse:
    """The writing end: slot `slot` of the file at `path`, or nowhere when `path` is None."""

    def __init__(self, path: Path | None = None, *, slot: int = 0) -> None:
        self._memory: mmap.mmap | None = None
        if path is not None:
            with open(path, "r+b") as file:
                self._memory = mmap.mmap(file.fileno(), 0)
        self._offset = slot * SLOT_BYTES
        self._version = 0
        self._recent: dict[str, float] = {}
        self._known: set[str] = set()
        """Phases that were left once: before, only some of their parts between collectives were
        timed, and the longest may be yet to come."""
        self._began = time.monotonic()
        self._phase, self._operation, self._bytes = "starting", "", 0
        self.step, self.generation, self.rank, self.collective = 0, 0, slot, 0
        self._begun_bytes = 0
        self.on_mark: Callable[[str, int], None] | None = None
        """Called at every phase with its name and the step; planned faults hang here."""
        self._write(0.0)

    @property
    def phase(self) -> str:
        """What this worker does now."""
        return self._phase

    def mark(self, phase: str, *, step: int | None = None) -> None:
        """This worker enters `phase` (of `step`, counted from 1: the step being computed)."""
        self._note()
        self._known.add(self._phase)
        if step is not None:
            self.step = step
        self._phase, self._operation = phase, ""
        self._write(self._expected())
        if self.on_mark is not None:
            self.on_mark(phase, self.step)

    def enter(self, operation: str, *, num_bytes: int) -> None:
        """A collective begins: from here on this worker waits for the others."""
        self._note()
        self.collective += 1
        self._operation, self._bytes = operation, num_bytes + self._begun_bytes
        self._write(self._recent.get(operation, 0.0))

    def leave(self) -> None:
        """The collective is over; the phase goes on."""
        self._note()
        self._operation, self._bytes = "", 0
        self._write(self._expected())

    def begin(self, num_bytes: int) -> None:
        """A collective begins that nobody waits for yet: what is called meanwhile queues behind."""
        self._begun_bytes += num_bytes

    def end(self, num_bytes: int) -> None:
        """Now it is waited for (`enter`); nothing, if it was of an earlier generation."""
        self._begun_bytes = max(0, self._begun_bytes - num_bytes)

    def join(self, *, generation: int, rank: int) -> None:
        """A new generation: collectives are counted anew."""
        self.generation, self.rank, self.collective = generation, rank, 0
        self._begun_bytes = 0

    def _expected(self) -> float:
        return self._recent.get(self._phase, 0.0) if self._phase in self._known else 0.0

    def _note(self) -> None:
        """Remember how long what ends here took: the longest lately, slowly forgotten."""
        now = time.monotonic()
        what = self._operation or self._phase
        took, self._began = now - self._began, now
        self._recent[what] = max(took, 0.95 * self._recent.get(what, 0.0))

    def _write(self, expected: float) -> None:
        if self._memory is None:
            return
        at, self._version = self._offset, self._version + 2
        fields = (
            *(self._began, expected, self.step, self.collective, self._bytes, self.generation),
            *(self.rank, self._phase.encode()[:32], self._operation.encode()[:24]),
        )
        struct.pack_into("<Q", self._memory, at, self._version - 1)
        _SLOT.pack_into(self._memory, at, self._version - 1, *fields)
        struct.pack_into("<Q", self._memory, at, self._version)


class Watch:
    """The reading end: makes the file for `slots` workers and reads their slots."""

    def __init__(self, path: Path, *, slots: int) -> None:
        path.write_bytes(b"\0" * (SLOT_BYTES * slots))
        self.path = path
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)

    def clear(self, slot: int) -> None:
        """Forget a worker that is gone, before another takes its slot."""
        at = slot * SLOT_BYTES
        self._memory[at : at + SLOT_BYTES] = b"\0" * SLOT_BYTES

    def read(self, slot: int) -> Beat | None:
        """The worker in `slot`; None before its first beat."""
        for _ in range(100):
            raw = self._memory[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES]
            version, at, expected, step, number, size, generation, rank, phase, operation = (
                _SLOT.unpack_from(raw)
            )
            if version == 0:
                return None
            again = struct.unpack_from("<Q", self._memory, slot * SLOT_BYTES)[0]
            if version % 2 == 0 and version == again:
                break
        # a worker that died half way through a write leaves an odd version: what it wrote counts
        words = [text.rstrip(b"\0").decode(errors="replace") for text in (phase, operation)]
        return Beat(at, expected, step, number, size, generation, rank, *words)
