"""The workers of another host, at the other end of a line to its agent (launch/agent.py).

What the agent says last is what is known. A host that is silent for longer than the lease, or that
ends the connection, is gone: all of its workers count as dead. It is called again and again, and
may be used anew once it answers.
"""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from shoal.comm.keys import Keys
from shoal.comm.line import Line
from shoal.launch import calls
from shoal.launch.hang import Sighting
from shoal.launch.links import Measured
from shoal.launch.pool import Worker
from shoal.launch.site import Found, Slot
from shoal.observe.pulse import Beat

_AGAIN_SECONDS = 2.0
_REFUSALS = 3
_KILL_SECONDS = 10.0
_STACK_SECONDS = 2.0


class RemoteSite:
    """The site of the host whose agent listens at `address` (tcp://HOST:PORT).

    Not there until it has answered `hello`: see `gone`. `check`: what is wrong with an answer, if
    anything; such a host is not used.
    """

    def __init__(
        self,
        address: str,
        *,
        keys: Keys,
        hello: calls.Hello,
        check: Callable[[calls.Here], str | None] = lambda here: None,
    ) -> None:
        self.address = address
        self.name = address.removeprefix("tcp://")
        self.open_address = ""
        self.here: calls.Here | None = None
        self.gone: str | None = "has not answered yet"
        self.wrong: str | None = None
        """What is wrong with it, where it has answered, or has another secret."""
        self.busy = False
        """Whether it is at work for another coordinator, and nothing else is wrong."""
        self._closed = False
        self.leaving = False
        """Whether its host is about to go."""
        self._keys, self._hello, self._check = keys, hello, check
        self._found: list[Found] = []
        self._decoder = msgspec.msgpack.Decoder(calls.ToCoordinator)
        self._workers: dict[int, Worker] = {}
        self._ranks: dict[int, tuple[int, ...]] = {}
        self._next = 0
        self._happened: deque[tuple[Worker, dict[str, Any] | None]] = deque()
        self._seen, self._beats = calls.Seen(), dict[int, Beat]()
        self._reached = calls.Reached(number=0)
        self.link: Measured | None = None
        """What was measured of the way that `measure_link` has named."""
        self.answers: deque[calls.Has | calls.Done] = deque()
        """What its agent says of saves."""
        self.brought: list[calls.Done] = []
        """Folders that it was given."""
        self.ask_to_bring: Callable[[str], calls.Bring | str | None] = lambda folder: None
        """What to say to a host that lacks a folder; in words, where nobody can give it; None: it
        is not known yet."""
        self._lacks: tuple[str, ...] = ()
        self._is_given = False
        self._stacks: dict[int, str] = {}
        now = time.monotonic()
        self._seen_at = self._heard_at = self._polled_at = self._said_at = now
        self._greeted = False
        self._called_at = now
        self._line = Line(address, keys=keys)

    # --- the calls of a site

    def found(self) -> list[Found]:
        return self._found

    def start(
        self, target: str, payload: dict[str, Any], *, slot: Slot, ranks: Sequence[int]
    ) -> Worker:
        number, self._next = self._next, self._next + 1
        worker = Worker(number, report=-1, open=False)
        self._workers[number], self._ranks[number] = worker, tuple(ranks)
        for rank in ranks:
            self._beats.pop(rank, None)
        self._send(
            calls.Start(
                worker=number,
                target=target,
                payload=payload,
                kind=slot.kind,
                index=slot.index,
                ranks=tuple(ranks),
            )
        )
        if self.gone is not None:  # nobody has heard it
            self._end(worker, status=-signal.SIGKILL)
        return worker

    def send(self, worker: Worker, order: dict[str, Any]) -> None:
        if worker.status is None:
            self._send(calls.Order(worker=worker.name, order=order))

    def signal(self, worker: Worker, number: int) -> None:
        if worker.status is None:
            self._send(calls.Signal(worker=worker.name, number=int(number)))

    def kill(self, workers: Sequence[Worker]) -> None:
        for worker in workers:
            self.signal(worker, signal.SIGKILL)
        deadline = time.monotonic() + _KILL_SECONDS
        while any(w.status is None for w in workers) and time.monotonic() < deadline:
            self._poll(timeout_seconds=0.1)
        kept = [each for each in self._happened if not any(each[0] is w for w in workers)]
        self._happened = deque(kept)
        for worker in workers:
            worker.told = True

    def events(self, *, timeout_seconds: float) -> Iterator[tuple[Worker, dict[str, Any] | None]]:
        self._poll(timeout_seconds=0.0 if self._happened else timeout_seconds)
        while self._happened:
            worker, message = self._happened.popleft()
            if message is None:
                worker.told = True
            yield worker, message

    def sightings(self) -> list[Sighting]:
        late = time.monotonic() - self._seen_at
        now = {n: w for n, w in self._workers.items() if w.status is None}
        running = {rank for number in now for rank in self._ranks[number]}
        pids = {None, *(worker.pid for worker in now.values())}  # else of whom it has replaced
        return [
            replace(one, silent_seconds=one.silent_seconds + late)
            for one in self._seen.sightings
            if one.rank in running and one.pid in pids
        ]

    def last_beat(self, rank: int) -> Beat | None:
        return self._beats.get(rank)

    def stack(self, worker: Worker, *, stopped: bool) -> str:
        self._stacks.pop(worker.name, None)
        self._send(calls.AskStack(worker=worker.name, stopped=stopped))
        deadline = time.monotonic() + _STACK_SECONDS
        while worker.name not in self._stacks and time.monotonic() < deadline:
            if self.gone is not None:
                break
            self._poll(timeout_seconds=0.1)
        return self._stacks.pop(worker.name, "")

    def is_stopped(self, worker: Worker) -> bool:
        return any(
            one.pid == worker.pid and one.state == "is stopped" for one in self._seen.sightings
        )

    def cpu_seconds(self, worker: Worker) -> float | None:
        seen = self._seen.sightings
        return next((one.cpu_seconds for one in seen if one.pid == worker.pid), None)

    def memory_kills(self) -> int:
        return self._seen.memory_kills

    def test_reach(self, number: int, addresses: Sequence[str]) -> None:
        self._send(calls.AskReach(number=number, addresses=tuple(addresses)))

    def unreached(self, number: int) -> frozenset[str] | None:
        found = self._reached
        return frozenset(found.unreached) if found.number == number else None

    def measure_link(self, address: str, *, sends: bool) -> None:
        """Find out how fast the way to `address` is: `link`, once it is known."""
        self.link = None
        self._send(calls.AskLink(address=address, sends=sends))

    @property
    def fetches(self) -> bool:
        """Whether it is there, and gets what it lacks first."""
        return self._is_given

    def tell(
        self, message: calls.AskKept | calls.Place | calls.Copy | calls.Join | calls.Publish
    ) -> None:
        """Say this to its agent, which answers in `answers`."""
        self._send(message)

    def close(self, *, status: int | None = None, another_leads: bool = False) -> None:
        """The run has ended, with this exit status; the agent ends what still runs.

        `another_leads`: it goes on, and what runs there is left to the coordinator that does.
        """
        if self._closed:
            return
        if another_leads:
            self._closed = True
            self._line.close()
            return
        self._send(calls.Bye(status=status))
        deadline = time.monotonic() + 1.0
        while self.gone is None and time.monotonic() < deadline:  # what is said last has to arrive
            self._poll(timeout_seconds=0.05)
            if not any(worker.status is None for worker in self._workers.values()):
                break
        self._closed = True
        self._line.close(patience_seconds=0.5 if self.gone is None else 0.0)

    # --- the line

    def _send(self, message: calls.ToAgent) -> None:
        self._said_at = time.monotonic()
        self._line.send(msgspec.msgpack.encode(message))

    def _poll(self, *, timeout_seconds: float) -> None:
        """Hear what comes within `timeout_seconds`, give a sign, and judge whether it is there."""
        now = time.monotonic()
        if now - self._polled_at > 1.0:  # we were busy or stopped ourselves: nobody is late yet
            self._heard_at += now - self._polled_at
        for text in self._line.receive(timeout_seconds=timeout_seconds):
            self._heard_at = time.monotonic()
            try:
                self._hear(self._decoder.decode(text))
            except msgspec.DecodeError:
                self.wrong = "speaks another version of shoal"
        now = self._polled_at = time.monotonic()
        if self._line.is_open and not self._greeted:
            self._greeted = True
            self._send(self._hello)
        if self._line.num_refused >= _REFUSALS:  # one may be an agent that went just then
            self.wrong = "does not know this run's secret (--keys, or SHOAL_KEYS)"
        if self.gone is not None:
            asks = self.here is None or bool(self.here.busy)
            self._give()
            silent = self._is_given and now - self._heard_at > self._hello.lease_seconds
            if silent or self._line.broken or (asks and now - self._called_at > _AGAIN_SECONDS):
                self._call_again()
        elif self._line.broken:
            self._lose("has ended the connection")
        elif now - self._heard_at > self._hello.lease_seconds:
            self._lose(f"gives no sign for {now - self._heard_at:.0f} s")
        elif now - self._said_at > calls.SIGN_SECONDS:
            self._send(calls.Alive())

    def _hear(self, message: calls.ToCoordinator) -> None:
        if isinstance(message, calls.Here):
            self._answered(message)
        elif isinstance(message, calls.Leaving):
            self.leaving = True
        elif isinstance(message, calls.Stack):
            self._stacks[message.worker] = message.text
        elif isinstance(message, calls.Reached):
            self._reached = message
        elif isinstance(message, calls.Linked):
            self.link = message.link
        elif isinstance(message, calls.Has) or (isinstance(message, calls.Done) and message.number):
            self.answers.append(message)
        elif isinstance(message, calls.Done):
            self._is_given, self._lacks = False, ()
            self.brought.append(message)
            self.wrong = message.problem or None
            if self.wrong is None:
                self._send(self._hello)
        elif isinstance(message, calls.Seen):
            self._seen, self._seen_at = message, time.monotonic()
            for number, pid in message.pids.items():
                if number in self._workers:
                    self._workers[number].pid = pid
            for one in message.sightings:
                if one.beat is not None:
                    self._beats[one.rank] = one.beat
        elif message.worker in self._workers:
            worker = self._workers[message.worker]
            if message.message is not None:
                self._happened.append((worker, message.message))
            elif message.status is not None and worker.status is None:
                self._end(worker, status=message.status)

    def _answered(self, here: calls.Here) -> None:
        self.name = f"{here.name} ({self.address.removeprefix('tcp://')})"
        self.open_address = f"{self.address.rpartition(':')[0]}:{here.open_port}"
        self.here, problem = here, self._check(here)
        self.busy = bool(here.busy)
        if here.busy:
            problem = f"is at work for {here.busy}"
        self.wrong = problem or ("; ".join(here.missing) or None)
        if self.wrong is None and self._hello.ranks:
            if here.running and not self._hello.adopts:
                self._call_again()  # too late to take them on: the second call ends them
                return
            self._lacks = here.lacks
            if here.lacks:
                self._give()
                return
            self.gone = None
            for each in here.running:
                worker = Worker(each.worker, report=-1, open=False)
                self._workers[each.worker], self._ranks[each.worker] = worker, (each.rank,)
                self._next = max(self._next, each.worker + 1)
                self._found.append(
                    Found(worker, each.rank, each.generation, each.waiting, each.done)
                )

    def _give(self) -> None:
        """Let it have what it lacks; and a sign meanwhile, for it is at work for us."""
        if not self._lacks:
            return
        if self._is_given:
            if time.monotonic() - self._said_at > calls.SIGN_SECONDS:
                self._send(calls.Alive())
            return
        found = self.ask_to_bring(self._lacks[0])
        self.wrong = found if isinstance(found, str) else None
        if isinstance(found, calls.Bring):
            self._is_given, self.gone = True, f"fetches {self._lacks[0]}"
            self._send(found)

    def begin(self) -> None:
        """From now on what runs there is not taken on any more."""
        self._hello = msgspec.structs.replace(self._hello, adopts=False)

    def _end(self, worker: Worker, *, status: int) -> None:
        worker.status = status
        self._happened.append((worker, None))

    def _lose(self, why: str) -> None:
        """All of its workers are dead, or as good as that: without us they end themselves."""
        self.gone, self.leaving = why, False
        for worker in self._workers.values():
            if worker.status is None:
                self._end(worker, status=-signal.SIGKILL)
        self._seen = calls.Seen(memory_kills=self._seen.memory_kills)
        self._call_again()

    def _call_again(self) -> None:
        self._line.close()
        self._line = Line(self.address, keys=self._keys)
        self.here, self._greeted, self._called_at = None, False, time.monotonic()
        self._lacks, self._is_given = (), False
        self._heard_at = self._polled_at = self._called_at
