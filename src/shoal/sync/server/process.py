"""A parameter server: the process that holds parts of the parameters, applies pushes, answers.

One loop, no threads: hear all requests that are there, let them happen, put what they promise on
the disk at once, then answer. It listens on loopback for workers with the run's key only, and ends
with its supervisor.
"""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from shoal.comm.keys import Keys
from shoal.comm.requests import Listener, Received, write_address
from shoal.comm.wire import DTYPES
from shoal.config.recipe import Recipe
from shoal.config.sync import Server as Section
from shoal.errors import ShoalError
from shoal.observe.events import Report
from shoal.sync.server import messages
from shoal.sync.server.journal import Event, Journal
from shoal.sync.server.part import Part, Settings
from shoal.sync.server.record import Record, Script

ANSWER_SECONDS = 0.5
"""After so long a request that has to wait is answered with NotYet, so that its sender knows that
it was heard."""
_IDLE_SECONDS = 0.2
SIGN_SECONDS = 0.5
"""So often a server says that it turns."""


def address_file(folder: Path, server: int) -> Path:
    """Where server number `server` says where it listens."""
    return folder / f"server-{server}"


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of a server on the fork server; returns its exit status."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the workers save first; the supervisor ends us
    report, number = Report(descriptor), payload["server"]
    recipe = Recipe.model_validate(payload["recipe"])
    section = recipe.sync
    assert isinstance(section, Section), "only that policy has servers"
    folder, run = Path(payload["servers"]), Path(payload["run"])
    settings = Settings(section, recipe.train.optimizer, payload["replicas"])
    torch.set_num_threads(1)
    try:
        keys = Keys.read(folder / "keys")
        place = address_file(folder, number)
        with Listener(keys=keys, port=_port_before(place)) as listener:
            journal = Journal(run / "server" / str(number)) if section.durable else None
            record = Record(run / "server", number)
            script = None if section.replay is None else Script.of(section.replay, server=number)
            server = Server(settings, listener, journal=journal, record=record, script=script)
            server.recover()
            if payload["begins"]:
                for part in server.parts.values():
                    part.stop_after = None  # whoever was asked to stop then is gone
            os.set_blocking(descriptor, False)
            orders = Orders(descriptor, server)
            listener.register(descriptor)
            write_address(place, listener.address)
            report.say("serving", server=number, address=listener.address, pid=os.getpid())
            said_at = 0.0
            while orders.follow():
                if time.monotonic() - said_at > SIGN_SECONDS:
                    said_at = time.monotonic()
                    report.say("turn")
                server.turn()
                if payload.get("spins_at") is not None and server.is_at(payload["spins_at"]):
                    _spin()
    except (ShoalError, OSError) as error:
        report.say("error", user=False, text=str(error), trace=traceback.format_exc(), rank=-1)
        return 1
    return 0


def _spin() -> None:
    """A planned fault: run without an end, and answer nothing."""
    while True:
        pass


def _port_before(place: Path) -> int:
    """The port of the server whose place this one takes, so that its workers find it again."""
    if not place.is_file():
        return 0
    return int(place.read_text(encoding="utf-8").rpartition(":")[2])


class Orders:
    """What the supervisor says: whose worker is gone. The server ends with its supervisor."""

    def __init__(self, descriptor: int, server: Server) -> None:
        self._descriptor, self._server, self._text = descriptor, server, b""

    def follow(self) -> bool:
        """Follow what has come; False when nobody is left to serve."""
        try:
            data = os.read(self._descriptor, 1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data:
            return False
        *lines, self._text = (self._text + data).split(b"\n")
        for line in lines:
            order = json.loads(line)
            if order["order"] == "gone":
                self._server.gone(order["replica"])
            elif order["order"] == "end":
                return False
        return True


@dataclass
class _Parked:
    """A request that has to wait."""

    received: Received
    request: messages.Request
    since: float


@dataclass
class Server:
    """What one server process does, without its process: tests call `turn` themselves."""

    settings: Settings
    listener: Listener
    journal: Journal | None = None
    record: Record | None = None
    script: Script | None = None
    parts: dict[int, Part] = field(default_factory=dict)
    num_refused: int = 0
    """Requests that made no sense, though their sender had the key."""

    def __post_init__(self) -> None:
        self._parked: list[_Parked] = []
        self._answers: list[Callable[[], None]] = []
        self._decoder = msgspec.msgpack.Decoder(messages.Request)
        self._grace: dict[int, float] = {}
        section = self.settings.section.consistency
        self._grace_seconds = getattr(section, "grace_seconds", 0.0)

    def recover(self) -> None:
        """Take up what a server before this one has left on the disk."""
        if self.journal is not None:
            self.parts = self.journal.recover(self._make)

    def _make(self, numbers: Any) -> Part:
        if numbers["settings"] != self.settings.fingerprint:
            raise ValueError("the state of another run, or of this one with other settings")
        regions = tuple(messages.Region(*each) for each in numbers["regions"])
        numel = max((region.stop for region in regions), default=0)
        values = torch.zeros(numel, dtype=getattr(torch, numbers["dtype"]))
        return Part(self.settings, regions, values)

    def turn(self) -> None:
        """Everything that has come, or comes within a moment."""
        waits = bool(self._parked or self._grace)
        timeout = 0.02 if waits else _IDLE_SECONDS
        for received in self.listener.receive(timeout_seconds=timeout):
            try:
                request = self._decoder.decode(received.body)
            except (ValueError, msgspec.DecodeError) as error:
                self._refuse(received, f"not a request: {error}")
                continue
            self._parked.append(_Parked(received, request, time.monotonic()))
        self._close_rounds()
        while self._serve_parked():
            pass
        self._commit()

    def is_at(self, clock: int) -> bool:
        """Whether some replica has pushed so often."""
        members = (part.consistency.members.values() for part in self.parts.values() if part.filled)
        return any(member.clock >= clock for each in members for member in each)

    def gone(self, replica: int) -> None:
        """The supervisor says that the worker of a replica is gone."""
        for position, part in self.parts.items():
            if part.filled and part.consistency.members[replica].alive:
                self._note({"event": "leave", "position": position, "replica": replica})
                part.leave(replica)

    # --- one turn

    def _serve_parked(self) -> bool:
        """Serve what can be served now; whether anything was, so that others may follow."""
        parked, self._parked = self._parked, []
        now, served = time.monotonic(), False
        for each in parked:
            why = self._serve(each.received, each.request)
            if why is None:
                served = True
            elif now - each.since > ANSWER_SECONDS:
                self._answer(each.received, messages.NotYet(why))
            else:
                self._parked.append(each)
        return served and bool(self._parked)

    def _serve(self, received: Received, request: messages.Request) -> str | None:
        """Let a request happen; what it has to wait for, if it has to."""
        try:
            if isinstance(request, messages.Hello):
                return self._hello(received, request)
            part = self.parts.get(request.position)
            if part is None or not 0 <= request.replica < self.settings.replicas:
                raise ValueError(f"nobody of position {request.position} has said hello")
            if part.lives.get(request.replica) != request.life:
                raise ValueError(
                    f"another worker has taken the place of this one of replica {request.replica}"
                )
            if isinstance(request, messages.Fill):
                return self._fill(received, request, part)
            if not part.filled:
                return "the first state, which replica 0 brings"
            if isinstance(request, messages.Pull):
                return self._pull(received, request, part)
            if isinstance(request, messages.Push):
                return self._push(received, request, part)
            if isinstance(request, messages.Collect):
                return self._collect(received, request, part)
            if isinstance(request, messages.Stop):
                return self._stop(received, request, part)
            return self._done(received, request, part)
        except ValueError as error:
            self._refuse(received, str(error))
            return None

    def _hello(self, received: Received, request: messages.Hello) -> str | None:
        part = self.parts.get(request.position)
        if part is None:
            values = torch.zeros(request.numel, dtype=DTYPES[request.dtype])
            part = self.parts[request.position] = Part(self.settings, request.regions, values)
        if part.regions != request.regions or part.values.numel() != request.numel:
            raise ValueError(
                f"the part of position {request.position} has {part.values.numel()} elements in "
                f"{part.regions}, this worker's {request.numel} in {request.regions}; all workers "
                "must run one recipe"
            )
        event = {"event": "join", "position": request.position, "replica": request.replica}
        if part.lives.get(request.replica) != request.life:
            if self._not_its_turn(event):
                return "its turn in the record"
            self._note({**event, "life": request.life})
            part.join(request.replica, life=request.life)
        clock = part.consistency.members[request.replica].clock
        facts = part.facts.get(request.replica, "")
        self._answer(received, messages.Welcome(part.filled, clock, facts))
        return None

    def _fill(self, received: Received, request: messages.Fill, part: Part) -> str | None:
        if not part.filled:
            part.fill(
                received.tensors,
                clocks=request.clocks,
                version=request.version,
                counts=request.counts,
                facts=request.facts,
                reads=request.reads,
            )
            if self.journal is not None:
                self.journal.snapshot(self.parts)
        clock = part.consistency.members[request.replica].clock
        self._answer(received, messages.Welcome(True, clock, part.facts.get(request.replica, "")))
        return None

    def _pull(self, received: Received, request: messages.Pull, part: Part) -> str | None:
        consistency, replica = part.consistency, request.replica
        if not consistency.may_begin(replica):
            return consistency.waits_for(replica)
        event = {"event": "pull", "position": request.position, "replica": replica}
        if self._not_its_turn(event):
            return "its turn in the record"
        if self.settings.section.delay_compensation:
            self._note(event)
        elif self.record is not None:
            self.record.note(event)
        values = part.pull(replica)
        answer = messages.Values(consistency.version, part.stops_after(replica))
        self._answer(received, answer, [values])
        return None

    def _push(self, received: Received, request: messages.Push, part: Part) -> str | None:
        member = part.consistency.members[request.replica]
        if request.clock < member.clock:  # it was acknowledged, but that was not heard
            self._answer(received, messages.Taken(0))
            return None
        if request.clock > member.clock:
            raise ValueError(f"expected the push of clock {member.clock}, got {request.clock}")
        if bool(received.tensors) != (request.weight > 0):
            raise ValueError("a gradient goes with a weight, and only with one")
        gradient: Tensor | None = None
        if received.tensors:
            numel = part.values.numel()
            gradient = self.settings.decoded(received.tensors[0], numel=numel)
        event = {"event": "push", "position": request.position, "replica": request.replica}
        if self._not_its_turn(event):
            return "its turn in the record"
        more: dict[str, Any] = {
            "weight": request.weight,
            "version": request.version,
            "rate": request.rate,
            "facts": request.facts,
            "reads": request.reads,
        }
        self._note({**event, **more}, gradient)
        staleness = part.push(request.replica, gradient, **more)
        self._answer(received, messages.Taken(staleness))
        return None

    def _collect(self, received: Received, request: messages.Collect, part: Part) -> str | None:
        consistency = part.consistency
        left = consistency.left(beside=request.replica)
        if request.when_done and (left or consistency.pending):
            clocks = [f"replica {r} (after {consistency.members[r].clock} pushes)" for r in left]
            return f"the last pushes of {', '.join(clocks) or 'a round'}"
        event = {"event": "collect", "position": request.position, "replica": request.replica}
        if self._not_its_turn(event):
            return "its turn in the record"
        if self.record is not None:
            self.record.note(event)
        state = messages.State(
            consistency.kept_clocks(),
            consistency.version,
            part.optimizer.counts(),
            {replica: facts for replica, facts in part.facts.items() if facts},
            tuple((s, d, c) for s, d, c in part.kept_reads(written_steps=request.written_steps)),
        )
        self._answer(received, state, [part.values, *part.optimizer.states.values()])
        return None

    def _stop(self, received: Received, request: messages.Stop, part: Part) -> str | None:
        if part.stop_after is None:
            event = {"event": "stop", "position": request.position, "replica": request.replica}
            self._note(event)
        self._answer(received, messages.Ending(part.stop(request.replica)))
        return None

    def _done(self, received: Received, request: messages.Done, part: Part) -> str | None:
        event = {"event": "finish", "position": request.position, "replica": request.replica}
        if not part.consistency.members[request.replica].done:
            if self._not_its_turn(event):
                return "its turn in the record"
            self._note(event)
            part.finish(request.replica)
        self._answer(received, messages.Taken(0))
        return None

    def _close_rounds(self) -> None:
        """End the rounds whose time of grace is over; in a replay, when the record says so."""
        now = time.monotonic()
        for position, part in self.parts.items():
            if not part.filled or not part.consistency.may_close:
                self._grace.pop(position, None)
                continue
            began = self._grace.setdefault(position, now)
            event = {"event": "close", "position": position}
            if self.script is not None:
                due = self.script.is_next(event)
            else:
                due = now - began >= self._grace_seconds
            if due:
                self._not_its_turn(event)
                self._note(event)
                part.close()
                del self._grace[position]

    # --- promises and answers

    def _not_its_turn(self, event: Event) -> bool:
        """In a replay: whether something else comes first in the record; else it happens now."""
        return self.script is not None and not self.script.take(event)

    def _note(self, event: Event, tensor: Tensor | None = None) -> None:
        if self.journal is not None:
            self.journal.note(event, tensor)
        if self.record is not None:
            self.record.note(event)

    def _answer(
        self, received: Received, answer: messages.Answer, tensors: list[Tensor] | None = None
    ) -> None:
        """Answer once everything that happened in this turn is on the disk."""
        body = msgspec.msgpack.encode(answer)
        copies = [each.clone() for each in tensors or ()]
        self._answers.append(lambda: self.listener.answer(received, body, copies))

    def _refuse(self, received: Received, problem: str) -> None:
        self.num_refused += 1
        self._answer(received, messages.Refused(problem))

    def _commit(self) -> None:
        if self.journal is not None:
            self.journal.sync()
            if self.journal.is_due:
                self.journal.snapshot(self.parts)
        if self.record is not None and self._answers:
            self.record.flush()
        answers, self._answers = self._answers, []
        for answer in answers:
            answer()
