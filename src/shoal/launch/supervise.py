"""The supervisor: starts the workers, watches them from outside, replaces what dies, and says why.

Workers build their model alone and then wait for an epoch: the set of ranks that belong together,
with a fresh place to meet. When one dies, the others leave their epoch with nothing applied. Its
place is taken by a new worker; the next epoch begins when it is there, or at once without it
where the recipe lets the degree shrink. What the newcomer lacks it gets from a living replica
(engine/agree.py). Only when nobody is left does the run go back to its last checkpoint.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.comm.keys import Keys
from shoal.config.recipe import Recipe
from shoal.engine.decision import Decision
from shoal.launch.attempt import Attempt, gave_up, signals_asked, stopped_at_once
from shoal.launch.deaths import Death, death_of, oom_kills
from shoal.launch.hang import Doctor, Sighting, Stuck, process_state, report, stack_of
from shoal.launch.memory import explained
from shoal.launch.pace import Pace
from shoal.launch.pool import Worker, WorkerPool
from shoal.observe.console import Console
from shoal.observe.events import RunFiles
from shoal.observe.pulse import Watch

TARGET = "shoal.engine.worker:run"
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 1.0
"""After a user's mistake, the other workers may still say what they saw before they are ended."""


@dataclass
class Seat:
    """A place among the workers, and who sits in it."""

    rank: int
    worker: Worker
    started_at: float = field(default_factory=time.monotonic)
    waiting: bool = False
    """Built, and waiting for an epoch."""
    epoch: int = 0
    """The epoch it was last told to join."""
    error: dict[str, Any] | None = None
    stuck: str | None = None
    done: bool = False
    """It has come to its end and said so."""

    @property
    def alive(self) -> bool:
        return self.worker.status is None


def run_workers(
    payload: dict[str, Any],
    *,
    decision: Decision,
    pool: WorkerPool,
    console: Console,
    begun: Callable[[], None] = lambda: None,
    story: list[dict[str, Any]] | None = None,
) -> Attempt:
    """Start the workers of `decision` and see them to their end. Raises the error that ended them.

    SIGINT and SIGTERM ask the workers to save and stop; a second one ends them at once (Stopped
    when there is a checkpoint to resume from, else Interrupted). SIGUSR1 prints where each is.
    `story` collects every event, also of a run that ends with an error.
    """
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder, signals_asked() as asked:
        supervisor = Supervisor(
            payload,
            decision=decision,
            pool=pool,
            attempt=Attempt(console, begun, story=[] if story is None else story),
            folder=Path(folder),
            asked=asked,
        )
        console.steps = payload["recipe"]["train"].get("steps")
        try:
            return supervisor.run()
        finally:
            pool.kill([seat.worker for seat in supervisor.seats if seat.alive])


class Supervisor:
    """Sees one run to its end."""

    def __init__(
        self,
        payload: dict[str, Any],
        *,
        decision: Decision,
        pool: WorkerPool,
        attempt: Attempt,
        folder: Path,
        asked: list[int],
    ) -> None:
        self._payload, self._pool, self._attempt = payload, pool, attempt
        self._folder, self._asked, self._passed_on = folder, asked, 0
        self._threads = decision.workers == "threads" and decision.layout.workers > 1
        self._size = 1 if self._threads else decision.layout.workers
        self._ranks = decision.layout.workers
        launch = payload["recipe"]["launch"]
        self._retries, self._limit = launch["retries"], launch["time_limit_seconds"]
        self._replica = 1 if self._threads else decision.layout.replica_workers
        """Workers that hold one replica together: neighbours in rank."""
        self._smallest = payload.get("smallest", self._size // self._replica)
        """Fewest replicas that may go on while others are replaced."""
        self._doctor = Doctor(
            silence_seconds=launch["silence_seconds"], meets_inside=self._replica > 1
        )
        self._pace = Pace()
        Keys.make(folder / "keys")
        self._watch = Watch(folder / "pulse", slots=self._ranks)
        self._run = Path(payload["run"])
        self._epoch = 0
        self._members: list[int] = []
        self._counted = 0
        self._failures: Counter[int] = Counter()
        self._faults = list(payload.get("faults", ()))
        self._oom_kills = oom_kills()
        self._began = self._looked = time.monotonic()
        self._hurt_at: float | None = None
        self._ending: float | None = None
        self.seats = [Seat(rank, self._start(rank)) for rank in range(self._size)]

    # --- the watch

    def run(self) -> Attempt:
        """Hear the workers until all have ended well. Raises the error that ended them."""
        while any(seat.alive for seat in self.seats):
            for worker, message in self._pool.events(timeout_seconds=_POLL_SECONDS):
                seat = next((seat for seat in self.seats if seat.worker is worker), None)
                if seat is None:
                    continue
                if message is not None:
                    self._hear(seat, message)
                elif worker.status != 75 and not seat.done:
                    self._ended(seat)
            self._pass_on()
            self._look()
            if self._ending is not None and time.monotonic() > self._ending:
                break
        attempt = self._attempt
        if not all(seat.done for seat in self.seats) and attempt.stopped is None:
            raise attempt.failure()
        return attempt

    def _hear(self, seat: Seat, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "waiting":
            if message["epoch"] >= seat.epoch:  # else it has left an older one, as it was told to
                seat.waiting = True
                self._form()
        elif kind == "step":
            self._stepped(message)
        elif kind == "fault":
            planned = next(f for f in self._faults if f["number"] == message["number"])
            self._faults.remove(planned)
            self._tell("fault", {**planned, "at": message["at"]}, to_file=False)
        elif kind == "ended":
            seat.done = True
        elif kind != "joined":
            if kind == "error":
                seat.error = message
            self._attempt.hear(message)

    def _stepped(self, message: dict[str, Any]) -> None:
        if self._hurt_at is not None and message["epoch"] == self._epoch:
            seconds = time.monotonic() - self._hurt_at
            self._hurt_at = None
            text = f"step {message['step']} committed {seconds:.2f} s after the loss was noticed"
            self._tell("recovered", {"step": message["step"], "seconds": seconds, "text": text})
        slow = self._pace.note(message)
        if slow is not None:
            self._tell("slow-worker", slow)

    def _pass_on(self) -> None:
        """Signals, the time limit, and the files STOP and SAVE in the run directory."""
        if self._limit is not None and time.monotonic() - self._began > self._limit:
            self._limit = None
            self._asked.append(signal.SIGTERM)
        for name, order in (("STOP", "stop"), ("SAVE", "save")):
            if (self._run / name).exists():
                (self._run / name).unlink(missing_ok=True)
                self._attempt.console.phase(f"found the file {name}: saving after this step")
                self._order({"order": order})
        while signal.SIGUSR1 in self._asked:
            self._asked.remove(signal.SIGUSR1)
            self.describe()
        if len(self._asked) > self._passed_on:
            self._passed_on = len(self._asked)
            if self._passed_on > 1:
                raise stopped_at_once(self._run)
            text = "asked to stop: saving after this step (again: stop at once)"
            self._attempt.console.phase(text)
            self._order({"order": "stop"})

    def _order(self, order: dict[str, Any]) -> None:
        for seat in self.seats:
            self._pool.send(seat.worker, order)

    def sightings(self) -> list[Sighting]:
        """Every rank as seen now; threads of one process share its state."""
        seen = []
        for rank in range(self._ranks):
            seat = self.seats[0 if self._threads else rank]
            if not seat.alive:
                continue
            beat = self._watch.read(rank)
            silent = self._doctor.silence(beat, started_at=seat.started_at)
            state, cpu = process_state(seat.worker.pid)
            seen.append(Sighting(rank, seat.worker.pid, beat, silent, state, cpu))
        return seen

    def _look(self) -> None:
        """Whether a worker is stuck; the first such is named, described and ended."""
        if time.monotonic() - self._looked < _POLL_SECONDS:
            return
        self._looked = time.monotonic()
        seen = self.sightings()
        for stuck in self._doctor.look(seen)[:1]:
            self._end_stuck(stuck, seen)

    def _end_stuck(self, stuck: Stuck, seen: list[Sighting]) -> None:
        seat = self.seats[0 if self._threads else stuck.rank]
        if not seat.alive or seat.stuck is not None:
            return
        seat.stuck = stuck.reason
        stack = self._stack(seat, stopped="stopped" in stuck.reason)
        for line in [*report(seen), *stack.splitlines()]:
            self._attempt.console.line(f"  {line}")
        fields = {"rank": stuck.rank, "text": f"worker {stuck.rank} {stuck.reason}; it is ended"}
        self._tell("stuck", {**fields, "who": report(seen), "stack": stack})
        self._pool.signal(seat.worker, signal.SIGKILL)

    def _stack(self, seat: Seat, *, stopped: bool) -> str:
        return stack_of(seat.worker.pid, self._folder / f"stack-{seat.rank}", stopped=stopped)

    def describe(self) -> None:
        """Print where each worker is and what its threads do (the hang doctor, on demand)."""
        for line in report(self.sightings()):
            self._attempt.console.line(line)
        for seat in self.seats:
            if seat.alive:
                self._attempt.console.line(f"stack of worker {seat.rank}:")
                self._attempt.console.line(self._stack(seat, stopped=False).rstrip())

    # --- losses

    def _ended(self, seat: Seat) -> None:
        """A worker ended before its time: recover, or give up."""
        if self._attempt.user_error() is not None:
            self._ending = self._ending or time.monotonic() + _GRACE_SECONDS
            return
        beat = self._watch.read(seat.rank)
        kills = oom_kills()
        death = death_of(
            rank=seat.rank,
            status=seat.worker.status or 0,
            step=beat.step if beat is not None else 0,
            where=beat.where if beat is not None else "starting",
            error=seat.error,
            stuck=seat.stuck,
            ran_out=kills > self._oom_kills,
        )
        self._oom_kills = kills
        fields = {"rank": death.rank, "why": death.kind, "step": death.step, "where": death.where}
        text = f"{death.text} ({death.where})"
        self._tell("lost", {**fields, "text": text, "noticed_at": time.monotonic()})
        if seat.epoch == 0 or self._counted != self._epoch:  # what one loss brings about is one
            self._counted = self._epoch
            self._failures[death.step] += 1
        times = self._failures[death.step]
        most = min(self._retries, 1) if death.kind == "out-of-memory" else self._retries
        if times > most or (self._passed_on and not self._survives(seat)):
            raise gave_up(death, times=times, run=self._run, doctor=self._about_memory(death))
        self._hurt_at = self._hurt_at or time.monotonic()
        self._recover(seat)

    def _about_memory(self, death: Death) -> str:
        """What the out-of-memory doctor says of this death; nothing of any other."""
        if death.kind != "out-of-memory":
            return ""
        recipe = Recipe.model_validate(self._payload["recipe"])
        decision = Decision.from_json(self._payload["decision"])
        return explained(recipe, decision, run=self._run, where=death.where)

    def _survives(self, lost: Seat) -> bool:
        """Whether a living worker holds what the lost one held; asked to stop, it will save it."""
        place = lost.rank % self._replica
        equals = [seat for seat in self.seats if seat.rank % self._replica == place]
        return any(seat.alive and seat.epoch > 0 for seat in equals)

    def _recover(self, lost: Seat) -> None:
        """Put a new worker into the seat; if nobody else holds its state, start all anew."""
        if not self._survives(lost):
            self._pool.kill([seat.worker for seat in self.seats if seat.alive])
            resume = any((self._run / "checkpoints").glob("step-*"))
            self._payload = {**self._payload, "resume": resume}
            for seat in self.seats:
                self._seat_anew(seat)
            where = "the last checkpoint" if resume else "the beginning"
            self._tell("restarted", {"text": f"all workers start again from {where}"})
            return
        if lost.epoch == self._epoch:
            self._order({"order": "lost", "number": self._epoch})
        self._seat_anew(lost, joining=True)
        self._form()

    def _seat_anew(self, seat: Seat, *, joining: bool = False) -> None:
        self._watch.clear(seat.rank)
        seat.worker, seat.started_at = self._start(seat.rank, joining=joining), time.monotonic()
        seat.waiting, seat.epoch, seat.error, seat.stuck, seat.done = False, 0, None, None, False

    def _start(self, rank: int, *, joining: bool = False) -> Worker:
        return self._pool.start(
            TARGET,
            {
                **self._payload,
                "rank": rank,
                "size": self._size,
                "pulse": str(self._watch.path),
                "stack": str(self._folder / f"stack-{rank}"),
                "keys": str(self._folder / "keys"),
                "faults": self._faults,
                "joining": joining,
            },
        )

    def _form(self) -> None:
        """Announce an epoch when one is needed and enough replicas can be in it."""
        able = [s for s in self.seats if s.alive and (s.waiting or 0 < s.epoch == self._epoch)]
        replicas = Counter(seat.rank // self._replica for seat in able)
        members = [s for s in able if replicas[s.rank // self._replica] == self._replica]
        changed = any(s.waiting for s in members) or [s.rank for s in members] != self._members
        enough = self._smallest * self._replica if self._epoch else self._size
        if changed and len(members) >= enough:
            self._announce(members)

    def _announce(self, members: list[Seat]) -> None:
        self._epoch += 1
        self._members = [seat.rank for seat in members]
        for rank, seat in enumerate(members):
            seat.epoch, seat.waiting = self._epoch, False
            order = {"order": "epoch", "number": self._epoch, "rank": rank, "size": len(members)}
            store = self._folder / f"epoch-{self._epoch:06d}"
            self._pool.send(seat.worker, {**order, "store": str(store)})
        if self._epoch > 1:
            count = len(members) // self._replica
            text = f"epoch {self._epoch}: {count} replicas (workers {self._members})"
            self._tell("epoch", {"epoch": self._epoch, "members": self._members, "text": text})

    def _tell(self, name: str, fields: dict[str, Any], *, to_file: bool = True) -> None:
        """Write an event of ours, show it, keep it for who asked for the run."""
        self._attempt.story.append({"event": name, "monotonic": time.monotonic(), **fields})
        if to_file:
            files = RunFiles(self._run)
            files.event(name, fields)
            files.close()
            self._attempt.console.event(name, fields)
