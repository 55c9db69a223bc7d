"""One host's workers: start them, give orders, hear them, see how they are.

What a supervisor needs to know of a host is here, and nowhere above. A site of this host is the
fork server and its watch; a site of another host will make the same calls over a socket to a
process there, which has a local site of its own.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from shoal.comm.keys import Keys
from shoal.launch.deaths import oom_kills
from shoal.launch.hang import Sighting
from shoal.launch.pool import Worker, WorkerPool
from shoal.observe.pulse import Beat, Watch


@dataclass(frozen=True)
class Slot:
    """What a worker is there for: its kind, and its number among those of its kind."""

    index: int
    kind: Literal["rank", "server", "environment"] = "rank"


@dataclass(frozen=True)
class Found:
    """A worker that ran before this supervisor did."""

    worker: Worker
    rank: int
    generation: int
    """The one that it was last told to join."""
    waiting: bool
    """For another generation."""
    done: bool


class Site(Protocol):
    """One host's workers."""

    @property
    def gone(self) -> str | None:
        """Why its workers count as dead, all of them: its host has gone. None: it is there."""

    @property
    def leaving(self) -> bool:
        """Whether its host is about to go, and wants to be done without."""

    @property
    def open_address(self) -> str:
        """Where other hosts test whether they reach it; empty: it is the only one."""

    def found(self) -> list[Found]:
        """Workers that ran there already, for a coordinator that is lost."""

    def start(
        self, target: str, payload: dict[str, Any], *, slot: Slot, ranks: Sequence[int]
    ) -> Worker:
        """Start a worker that runs `module:function(payload, report)` for `slot`.

        `ranks`: those that live in it; one, unless they are threads. Raises WorkerError.
        """

    def send(self, worker: Worker, order: dict[str, Any]) -> None:
        """Give a worker an order; one that is gone needs none."""

    def signal(self, worker: Worker, number: int) -> None:
        """Send a signal to a worker that still runs."""

    def kill(self, workers: Sequence[Worker]) -> None:
        """End `workers` at once and wait until they are gone."""

    def events(self, *, timeout_seconds: float) -> Iterator[tuple[Worker, dict[str, Any] | None]]:
        """What happens within `timeout_seconds`: a message of a worker, or None at its end."""

    def sightings(self) -> list[Sighting]:
        """Every rank whose worker runs, as seen now."""

    def last_beat(self, rank: int) -> Beat | None:
        """The last sign that `rank` gave, whether it still lives or not."""

    def stack(self, worker: Worker, *, stopped: bool) -> str:
        """What every thread of a worker does just now; empty when it does not tell.

        A stopped worker is continued for it, so ask this only of one that is ended next.
        """

    def is_stopped(self, worker: Worker) -> bool:
        """Whether the process of a worker is stopped (SIGSTOP) just now, and a moment later."""

    def cpu_seconds(self, worker: Worker) -> float | None:
        """What the process of a worker has computed so far; None where that is not known."""

    def memory_kills(self) -> int:
        """Processes that this host has ended for want of memory so far."""

    def test_reach(self, number: int, addresses: Sequence[str]) -> None:
        """Begin to find out which other hosts it reaches; `number` of the test."""

    def unreached(self, number: int) -> frozenset[str] | None:
        """Addresses that it does not reach, by that test; None: it has not said so yet."""

    def close(self) -> None:
        """End what still runs and clear up."""


_LOOK_CLOSER_SECONDS = 0.5
"""Silence after which each thread of a worker is looked at."""
_PREFIX, _OWNER = "shoal-", "owner"


def _own(folder: Path) -> IO[bytes]:
    """A file in `folder` that is locked for as long as this process lives."""
    file = (folder / f".{_OWNER}").open("wb")
    fcntl.flock(file, fcntl.LOCK_EX)
    os.rename(file.name, folder / _OWNER)  # nobody ever sees it unlocked
    return file


def sweep(above: Path) -> None:
    """Remove what sites of this user left in `above`, with their keys, when they were killed."""
    for folder in above.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # somebody else's, made by another version, or still owned
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with (folder / _OWNER).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)


@dataclass
class _Started:
    """A worker of this site."""

    worker: Worker
    slot: Slot
    ranks: tuple[int, ...]
    stack: Path
    started_at: float = field(default_factory=time.monotonic)


class LocalSite:
    """The workers of this host, from its fork server. A context manager: leaving it closes it."""

    gone: str | None = None
    leaving = False
    open_address = ""

    def __init__(self, pool: WorkerPool, *, num_ranks: int, keys: Keys | None = None) -> None:
        """`keys`: those of the run, where it has several hosts; else new ones."""
        self._pool = pool
        sweep(Path(tempfile.gettempdir()))
        self._folder = tempfile.TemporaryDirectory(prefix=_PREFIX)
        self.folder = Path(self._folder.name)
        self._owner = _own(self.folder)
        self._watch = Watch(self.folder / "pulse", slots=num_ranks)
        if keys is None:
            Keys.make(self.folder / "keys")
        else:
            keys.write(self.folder / "keys")
        self._started: dict[Slot, _Started] = {}
        self._looked_at = self._since = time.monotonic()

    def __enter__(self) -> LocalSite:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def found(self) -> list[Found]:
        return []

    def start(
        self, target: str, payload: dict[str, Any], *, slot: Slot, ranks: Sequence[int]
    ) -> Worker:
        for rank in ranks:
            self._watch.clear(rank)
        stack = self.folder / f"stack-{slot.kind}-{slot.index}"
        paths = {"pulse": self._watch.path, "stack": stack, "keys": self.folder / "keys"}
        own = {name: str(path) for name, path in paths.items()}
        worker = self._pool.start(target, {**payload, **own})
        self._started[slot] = _Started(worker, slot, tuple(ranks), stack)
        return worker

    def send(self, worker: Worker, order: dict[str, Any]) -> None:
        self._pool.send(worker, order)

    def signal(self, worker: Worker, number: int) -> None:
        self._pool.signal(worker, number)

    def kill(self, workers: Sequence[Worker]) -> None:
        self._pool.kill(list(workers))

    def events(self, *, timeout_seconds: float) -> Iterator[tuple[Worker, dict[str, Any] | None]]:
        own = [each.worker for each in self._started.values()]
        return self._pool.events(timeout_seconds=timeout_seconds, only=own)

    def sightings(self) -> list[Sighting]:
        now = time.monotonic()
        if now - self._looked_at > 1.0:  # this process was stopped itself: nobody is late yet
            self._since = now
        self._looked_at = now
        return sorted(
            (
                self._sighting(each, rank, now=now)
                for each in self._started.values()
                if each.worker.status is None
                for rank in each.ranks
            ),
            key=lambda one: one.rank,
        )

    def _sighting(self, each: _Started, rank: int, *, now: float) -> Sighting:
        beat = self._watch.read(rank)
        last = each.started_at if beat is None else beat.beat_at
        silent = now - max(self._since, last)
        state, cpu = process_state(each.worker.pid, every_thread=silent > _LOOK_CLOSER_SECONDS)
        own = None if cpu is None else cpu / len(each.ranks)
        return Sighting(rank, each.worker.pid, beat, silent, state, own)

    def last_beat(self, rank: int) -> Beat | None:
        return self._watch.read(rank)

    def stack(self, worker: Worker, *, stopped: bool) -> str:
        found = (each for each in self._started.values() if each.worker is worker)
        each = next(found, None)
        return "" if each is None else stack_of(worker.pid, each.stack, stopped=stopped)

    def is_stopped(self, worker: Worker) -> bool:
        if process_state(worker.pid)[0] != "is stopped":
            return False
        time.sleep(0.05)
        return process_state(worker.pid)[0] == "is stopped"

    def cpu_seconds(self, worker: Worker) -> float | None:
        return process_state(worker.pid)[1]

    def memory_kills(self) -> int:
        return oom_kills()

    def test_reach(self, number: int, addresses: Sequence[str]) -> None:
        return

    def unreached(self, number: int) -> frozenset[str] | None:
        return frozenset()

    def close(self) -> None:
        running = [each.worker for each in self._started.values() if each.worker.status is None]
        try:
            self._pool.kill(running)
        finally:
            self._folder.cleanup()
            self._owner.close()


_STATES = {
    "R": "runs",
    "S": "sleeps",
    "T": "is stopped",
    "t": "is traced",
    "D": "waits for a device",
}


def process_state(pid: int | None, *, every_thread: bool = False) -> tuple[str, float | None]:
    """(state in words, CPU seconds used so far) of a process, where the system tells (Linux).

    The state is its main thread's; with `every_thread` it sleeps only if all of them do: ranks may
    be threads, and a rank may wait for threads that compute for it.
    """
    if pid is None:
        return "unknown", None
    fields = _stat(Path(f"/proc/{pid}/stat"))
    if not fields:
        return "unknown", None
    letter = fields[0]
    if letter == "S" and every_thread:
        tasks = (_stat(path) for path in Path(f"/proc/{pid}/task").glob("*/stat"))
        letter = next((each[0] for each in tasks if each and each[0] in "RD"), letter)
    ticks = os.sysconf("SC_CLK_TCK")
    return _STATES.get(letter, "unknown"), (int(fields[11]) + int(fields[12])) / ticks


def _stat(path: Path) -> list[str]:
    """What the system says of a process or thread from its state on; empty when it is gone."""
    try:
        text = path.read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the name may hold anything, brackets too


def stack_of(pid: int | None, file: Path, *, stopped: bool) -> str:
    """What every thread of a worker does just now, by SIGUSR1; empty when it does not tell.

    A stopped worker is continued for it, so ask this only of one that is ended next.
    """
    if pid is None:
        return ""
    before = file.stat().st_size if file.is_file() else 0
    try:
        os.kill(pid, signal.SIGUSR1)
        if stopped:
            os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return ""
    deadline = time.monotonic() + 0.2
    text = ""
    while time.monotonic() < deadline:
        text = file.read_text(errors="replace")[before:] if file.is_file() else ""
        if "most recent call first" in text:
            time.sleep(0.01)
            return file.read_text(errors="replace")[before:]
        time.sleep(0.005)
    return text
