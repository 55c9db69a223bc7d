"""The parameter servers of a run, as its supervisor sees them: started, watched, started again.

A server that dies leaves what it has promised on the disk (sync/server/journal.py); the one that
takes its place goes on from there, and the workers meanwhile wait for it.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shoal.comm.keys import Keys
from shoal.config.server import Quorum
from shoal.config.sync import Server
from shoal.engine.job import Job
from shoal.errors import ConfigError, Problem, WorkerError
from shoal.launch.cluster import Cluster
from shoal.launch.pool import Worker
from shoal.launch.site import Site, Slot
from shoal.sync.server.record import Script

TARGET = "shoal.sync.server.process:run"
_PATIENCE = 5.0
"""Times launch.silence_seconds that a server may compute between two turns."""
_STARVED = 12.0
"""Times that: after it even one that does not compute is given up."""


class Servers:
    """As many servers as the recipe says, all on the first host."""

    def __init__(self, job: Job, *, sites: Sequence[Site], cluster: Cluster) -> None:
        section, layout = job.recipe.sync, job.decision.layout
        assert isinstance(section, Server), "only that policy has servers"
        consistency = section.consistency
        if isinstance(consistency, Quorum) and consistency.least > layout.replicate:
            what = f"no round would ever end: there are {layout.replicate} replicas, got "
            hint = f"set it to {layout.replicate} at most, or parallel.replicate to more"
            problem = Problem("sync.consistency.least", f"{what}{consistency.least}", hint)
            raise ConfigError([problem])
        if section.replay is not None:
            for number in range(section.servers):
                Script.of(section.replay, server=number)
        self._durable = section.durable
        self.folder: Path = cluster.servers()
        self.folder.mkdir(mode=0o700)
        Keys.make(self.folder / "keys")
        self._job, self._site = job, sites[0]
        self._retries = job.recipe.launch.retries
        self._losses = 0
        self._gone: set[int] = set()
        self._errors: dict[int, str] = {}
        self._turns: dict[int, tuple[float, float]] = {}
        """Of each server when it has begun a turn last, and what it had computed by then."""
        self._patience = _PATIENCE * job.recipe.launch.silence_seconds
        self.workers = [self._started(n, begins=True) for n in range(section.servers)]

    def _started(self, number: int, *, begins: bool = False) -> Worker:
        payload = {
            "recipe": self._job.recipe.model_dump(mode="json"),
            "run": str(self._job.run.resolve()),
            "servers": str(self.folder),
            "server": number,
            "begins": begins,
            "replicas": self._job.decision.layout.replicate,
            "spins_at": self._planned("spin-server", number) if begins else None,
        }
        self._turns.pop(number, None)
        return self._site.start(TARGET, payload, slot=Slot(number, "server"), ranks=())

    def _planned(self, kind: str, number: int) -> int | None:
        """The step of a planned fault of a server, for rehearsals and tests."""
        faults = self._job.instruments.planned_faults
        mine = (each for each in faults if each["kind"] == kind and each["server"] == number)
        return next((int(each["step"]) for each in mine), None)

    def close(self) -> None:
        """End the servers. The run is saved: what they have on the disk is needed no more."""
        self._site.kill(self.workers)
        for number in range(len(self.workers)):
            shutil.rmtree(self._job.run / "server" / str(number), ignore_errors=True)

    def begin_anew(self) -> None:
        """Take other servers in the place of all: the run goes back to a save."""
        self._site.kill([worker for worker in self.workers if worker.status is None])
        self._gone.clear()
        self.workers = [self._started(n, begins=True) for n in range(len(self.workers))]

    def came(self, replica: int) -> None:
        """Another worker speaks for a replica."""
        self._gone.discard(replica)

    def gone(self, replica: int) -> None:
        """The worker of a replica has ended, one way or another."""
        self._gone.add(replica)
        for worker in self.workers:
            self._site.send(worker, {"order": "gone", "replica": replica})

    def look(self) -> None:
        """End a server that is stopped (SIGSTOP), or runs without an end; another takes its place.

        One that writes to a slow disk does not compute, and is waited for.
        """
        for number, worker in enumerate(self.workers):
            if worker.status is not None:
                continue
            if self._site.is_stopped(worker):
                self._site.signal(worker, signal.SIGKILL)
            elif (since := self._silent_seconds(number, worker)) is not None:
                self._errors[number] = f"has begun no turn for {since:.1f} s, and is ended"
                self._site.signal(worker, signal.SIGKILL)

    def _silent_seconds(self, number: int, worker: Worker) -> float | None:
        """How long a server has been silent, when that is too long."""
        at, computed = self._turns.get(number, (time.monotonic(), 0.0))
        silent, now = time.monotonic() - at, self._site.cpu_seconds(worker)
        spent = silent if now is None else now - computed
        late = silent > self._patience and spent > self._patience
        return silent if late or silent > _STARVED * self._patience else None

    def hear(
        self,
        worker: Worker,
        message: dict[str, Any] | None,
        *,
        tell: Callable[[str, dict[str, Any]], None],
    ) -> bool:
        """What a server says; None at its end, after which another takes its place.

        Returns whether state was lost with it. Raises WorkerError when that happens too often.
        """
        if worker not in self.workers:
            return False
        number = self.workers.index(worker)
        if message is None:
            self._replace(number, worker, tell=tell)
        elif message["kind"] == "error":
            self._errors[number] = message["text"]
        elif message["kind"] == "turn":
            self._turns[number] = (time.monotonic(), self._site.cpu_seconds(worker) or 0.0)
        elif message["kind"] == "serving":
            for replica in self._gone:  # those that are replaced will say so themselves
                self._site.send(worker, {"order": "gone", "replica": replica})
            text = f"parameter server {number} listens at {message['address']}"
            fields = {"server": number, "address": message["address"], "pid": message["pid"]}
            tell("serving", {**fields, "text": text})
        return message is None and not self._durable

    def _replace(
        self, number: int, worker: Worker, *, tell: Callable[[str, dict[str, Any]], None]
    ) -> None:
        self._losses += 1
        why = self._errors.pop(number, None) or f"ended with status {worker.status}"
        text = f"parameter server {number} {why}"
        tell("lost-server", {"server": number, "text": f"{text}; another one takes its place"})
        if self._losses > self._retries:
            raise WorkerError(f"{text}, {self._losses} losses of servers in all; giving up")
        if self._durable:
            self.workers[number] = self._started(number)
