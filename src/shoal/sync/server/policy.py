"""Policy server, the workers' side: push to the parameter servers, pull from them.

Replicas meet nowhere else. A step begins with what was pulled after the one before; a push is
acknowledged once it is on a server's disk. The whole state of the run (parameters, the servers'
optimizer states, the clock of every replica) is with the servers: whoever takes a worker's place,
or evaluates and saves, gets it there.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
from torch import Tensor

from shoal.comm.codec.codec import mixed
from shoal.comm.codec.kinds import encoding
from shoal.comm.flat import FlatLayout, Span, Vector
from shoal.comm.keys import Keys
from shoal.comm.requests import Caller
from shoal.comm.wire import NAMES
from shoal.config.optimizers import OptimizerSection
from shoal.config.server import AsTrained, Bounded
from shoal.config.sync import Server as Section
from shoal.errors import WorkerError
from shoal.layout import Share
from shoal.sync.every_step import sum_of
from shoal.sync.policy import Given, Gradients, Place, Policy, Reduced
from shoal.sync.server import messages
from shoal.sync.server.optimizers import states_of
from shoal.sync.server.process import address_file

_LARGEST_FACTS = 1 << 18
_SAY_SECONDS = 5.0
"""A wait for other replicas is told after so long, and again each time as much has passed."""
_TORCH_NAMES = {
    "server/momentum": "momentum_buffer",
    "server/exp_avg": "exp_avg",
    "server/exp_avg_sq": "exp_avg_sq",
}
"""States of train.optimizer at the server, as the state of a run and a checkpoint have them."""

Answered = tuple[Any, list[Tensor]]


class Server(Policy):
    """One rank's part in a run around parameter servers."""

    keeps_equal_state = True  # one replica is the whole world of its ranks
    alone = True
    apart = True

    @classmethod
    def of(cls, section: Section, given: Given) -> Server:
        assert given.place is not None, "refused for runs that have no servers"
        return cls(section, given, given.place)

    def __init__(self, section: Section, given: Given, place: Place) -> None:
        super().__init__(given.division)
        self._section, self._place, self._steps = section, place, given.steps
        self._values = given.values
        self._every = section.every_steps
        self._pushes_gradients = section.push == "gradients"
        spans = given.layout.divide(section.servers, numel=given.values.numel())
        self._spans = [span for span in spans if len(span)]
        trained = isinstance(section.optimizer, AsTrained)
        optimizer: Any = place.optimizer if trained else section.optimizer
        names = states_of(optimizer)
        self._own: list[Vector] = []
        if not trained:
            regions = frozenset(given.layout.regions) - {"frozen"}
            self._own = [Vector(n, torch.zeros_like(given.values), regions) for n in names]
        self._states = [
            place.states[_TORCH_NAMES[name]] if trained else self._own[index].tensor
            for index, name in enumerate(names)
        ]
        self._regions = _regions(given.layout, self._spans, _decay_of(optimizer))
        self._callers: list[Caller] = []
        self._life = secrets.randbits(40)
        self._clock = 0
        self._versions = [0] * len(self._spans)
        self._base: Tensor | None = None if self._pushes_gradients else given.values.clone()
        self._codec, self._seed = encoding(section.codec), given.seed
        self._error = torch.zeros_like(given.values) if section.codec.error_feedback else None
        """What codecs have left out so far; of this worker, and gone with it."""
        self._flat: Tensor | None = None
        self._weight = 0.0
        self._staleness = 0
        self._stop_after = -1
        self._read: list[messages.Read] = []
        """Of the steps since the last push."""
        self._reads: list[list[int]] = []
        """Of all replicas, as collected; and how many steps of it are written."""
        self._written_steps = 0
        self._kept: dict[str, Any] = {}
        """Clocks, versions and counts, of the checkpoint to begin with or of the last save."""

    # --- the protocol of policies

    def share(self, step: int) -> Share:
        return self.division.share(self._place.replica, self._place.replicas)

    def owned(self, layout: FlatLayout, *, numel: int) -> Span:
        return Span(0, 0) if self._pushes_gradients else Span(0, numel)

    def reduce(self, gradients: Gradients) -> Reduced:
        flat = sum_of(gradients.nodes) if gradients.nodes else gradients.flat
        self._flat = flat
        return Reduced(Span(0, flat.numel()), flat)

    def account(self, step: int, read: Sequence[int]) -> None:
        digest, count = read
        self._read.append((step, digest, count))

    def accounted(self, *, last: bool) -> list[tuple[int, list[int]]]:
        found = []
        for step, digest, count in self._reads:
            if step < self._written_steps:
                continue
            if not last and not self._is_final(step, count=count):
                break
            found.append((step, [digest, count]))
            self._written_steps = step + 1
        return found

    def _is_final(self, step: int, *, count: int) -> bool:
        """Whether nobody will read anything more of a step: all have, or its update was made."""
        bounded = isinstance(self._section.consistency, Bounded)
        made = bounded and step < self._every * min(self._kept["versions"])
        return count == self.division.global_batch_samples or made

    def after_step(self, step: int, *, targets: int) -> None:
        self._weight += targets
        if not self._due(step + 1):
            return
        self._push(step)
        if step + 1 < self._steps:
            self._pull()

    def _due(self, step: int) -> bool:
        return step % self._every == 0 or step == self._steps

    def equal_after(self, step: int) -> bool:
        return True

    def vectors(self) -> Iterable[Vector]:
        return self._own

    def facts(self) -> dict[str, Any]:
        return self._kept

    def restore(self, facts: Mapping[str, Any]) -> None:
        self._kept = dict(facts)

    def begin(self, step: int) -> None:
        clock = self._clock_of(step)
        clocks = {str(replica): clock for replica in range(self._place.replicas)}
        self._kept = {"clocks": clocks, "versions": None, "counts": {"steps": step}}

    def figures(self) -> dict[str, float]:
        return {"staleness": self._staleness}

    def close(self) -> None:
        for caller in self._callers:
            caller.close()
        self._callers = []

    # --- joining, saving, ending

    def arrive(self, step: int, *, brings: bool) -> tuple[int, dict[str, Any]]:
        """Say hello to all servers, bring the first state if this is the first replica, and pull.

        Raises ChannelError when a server cannot be reached, WorkerError when it refuses.
        """
        self._life = secrets.randbits(40)
        self._connect()
        hellos = [
            messages.Hello(
                **self._me,
                numel=len(span),
                regions=regions,
                dtype=NAMES[self._values.dtype],
            )
            for span, regions in zip(self._spans, self._regions)
        ]
        welcomes = [answer for answer, _ in self._ask_all(hellos)]
        empty = not all(welcome.filled for welcome in welcomes)
        if empty and not brings:
            raise WorkerError("joined a run whose servers have no state any more")
        if empty and self._place.replica == 0:
            if not self._kept:
                self.begin(step)
            welcomes = [answer for answer, _ in self._fill()]
        self._pull()
        if not all(welcome.filled for welcome in welcomes):  # filled by now: with which clocks?
            welcomes = [answer for answer, _ in self._ask_all(hellos)]
        self._clock = min(welcome.clock for welcome in welcomes)
        self._read, self._written_steps = [], 0
        facts = next((w.facts for w in welcomes if w.clock == self._clock and w.facts), "{}")
        self._weight = 0.0
        return min(self._clock * self._every, self._steps), json.loads(facts)

    @contextmanager
    def gathered(self, *, last: bool) -> Iterator[None]:
        own = self._values.clone()
        written = self._written_steps
        requests = [
            messages.Collect(**self._me, when_done=last, written_steps=written) for _ in self._spans
        ]
        answers = self._ask_all(requests)
        for span, (_, (values, *states)) in zip(self._spans, answers):
            part = slice(span.start, span.stop)
            self._values[part].copy_(values)
            for state, given in zip(self._states, states, strict=True):
                state[part].copy_(given)
        state = answers[0][0]
        self._reads = [list(read) for read in state.reads]
        self._kept = {
            "reads": self._reads,
            "clocks": {str(replica): clock for replica, clock in state.clocks.items()},
            "versions": [answer.version for answer, _ in answers],
            "counts": state.counts,
        }
        try:
            yield
        finally:
            if not last:
                self._values.copy_(own)

    def ask_to_stop(self) -> None:
        if self._stop_after < 0:
            answers = self._ask_all([messages.Stop(**self._me) for _ in self._spans])
            self._stop_after = max(answer.stop_after for answer, _ in answers)

    def finish(self) -> None:
        self._ask_all([messages.Done(**self._me) for _ in self._spans])

    @property
    def ends_at(self) -> int | None:
        return None if self._stop_after < 0 else self._stop_after * self._every

    # --- talking to servers

    @property
    def _me(self) -> dict[str, int]:
        place = self._place
        return {"position": place.position, "replica": place.replica, "life": self._life}

    def _connect(self) -> None:
        self.close()
        keys = Keys.read(self._place.servers / "keys")
        self._callers = [
            Caller(
                address_file(self._place.servers, number),
                keys=keys,
                name=f"parameter server {number}",
                say=self._place.say,
            )
            for number in range(len(self._spans))
        ]

    def _fill(self) -> list[Answered]:
        kept = self._kept
        clocks = {int(replica): clock for replica, clock in kept["clocks"].items()}
        requests, tensors = [], []
        for number, span in enumerate(self._spans):
            versions = kept["versions"] or [max(clocks.values())] * len(self._spans)
            version = versions[number] if number < len(versions) else versions[0]
            fill = messages.Fill(
                **self._me,
                clocks=clocks,
                version=version,
                counts=kept["counts"],
                facts={},
                reads=tuple((s, d, c) for s, d, c in kept.get("reads", ())) if not number else (),
            )
            requests.append(fill)
            part = slice(span.start, span.stop)
            tensors.append([each[part] for each in (self._values, *self._states)])
        return self._ask_all(requests, tensors)

    def _push(self, step: int) -> None:
        change = self._change()
        clock = self._clock_of(step + 1) - 1
        finite = self._all_finite(change)
        weight = self._weight if finite else 0.0
        requests: list[Any] = []
        tensors: list[list[Tensor]] = []
        for span, version in zip(self._spans, self._versions):
            requests.append(
                messages.Push(
                    **self._me,
                    clock=clock,
                    version=version,
                    weight=weight,
                    rate=self._place.rate(step) if self._pushes_gradients else 1.0,
                    facts=self._facts_of_run(),
                    reads=tuple(self._read) if not tensors and self._place.position == 0 else (),
                )
            )
            tensors.append([])
            if change is not None and weight > 0:
                tensors[-1].append(self._encoded(change, span, key=clock))
        answers = self._counted("push", requests, tensors)
        self._staleness = max(answer.staleness for answer, _ in answers)
        self._clock, self._weight, self._read = clock + 1, 0.0, []

    def _encoded(self, change: Tensor, span: Span, *, key: int) -> Tensor:
        """What is sent of a part of the change; what a codec leaves out is sent the next time."""
        part = change[span.start : span.stop]
        if self._codec is None:
            return part
        own = None if self._error is None else self._error[span.start : span.stop]
        padded = part.new_zeros(1, self._codec.part(len(span), size=1), dtype=torch.float32)
        padded[0, : len(span)] = part if own is None else part + own
        wire = self._codec.encode(padded, key=mixed(self._seed, key, self._place.replica))
        if own is not None:
            sent = self._codec.decode(wire, numel=padded.shape[1])
            own.copy_((padded - sent)[0, : len(span)])
        return wire.view(-1)

    def _all_finite(self, change: Tensor | None) -> bool:
        """Whether the change is finite on every rank of this replica: they push it or leave it."""
        wrong = torch.tensor([float(change is None or not bool(torch.isfinite(change).all()))])
        self.together.sum_(wrong)
        return not wrong.item()

    def _change(self) -> Tensor | None:
        """What is pushed: the gradient of the step, or the way from the base, backwards."""
        if self._pushes_gradients:
            return self._flat
        assert self._base is not None, "kept for deltas"
        return self._base - self._values

    def _pull(self) -> None:
        answers = self._counted("pull", [messages.Pull(**self._me) for _ in self._spans])
        stops = []
        for index, (span, (answer, (values,))) in enumerate(zip(self._spans, answers)):
            self._values[span.start : span.stop].copy_(values)
            self._versions[index] = answer.version
            stops.append(answer.stop_after)
        if self._base is not None:
            self._base.copy_(self._values)
        if self._stop_after < 0:
            self._stop_after = max(stops)

    def _counted(
        self, name: str, requests: list[Any], tensors: list[list[Tensor]] | None = None
    ) -> list[Answered]:
        traffic, began = self.peers.traffic, time.perf_counter()
        waited = traffic.waiting_seconds
        answers = self._ask_all(requests, tensors)
        waited = traffic.waiting_seconds - waited
        traffic.communication_seconds += time.perf_counter() - began - waited
        for number, (_, received) in enumerate(answers):
            sent = received if tensors is None else [*tensors[number], *received]
            num_bytes = sum(each.nbytes for each in sent)
            traffic.sent_bytes[name] += num_bytes
            traffic.went({f"server {number}": num_bytes})
        return answers

    def _ask_all(
        self, requests: list[Any], tensors: list[list[Tensor]] | None = None
    ) -> list[Answered]:
        """One request to each server, and their answers; asked again for as long as it takes.

        Raises WorkerError for a request that is refused.
        """
        given = tensors or [[] for _ in requests]
        bodies = [msgspec.msgpack.encode(request) for request in requests]
        answers: list[Answered | None] = [None] * len(requests)
        began = told = time.perf_counter()
        pulse = self.peers.pulse
        phase, waited = pulse.phase, False
        pulse.mark("waiting for the servers")  # as long as it takes, also for a new server
        while missing := [n for n, answer in enumerate(answers) if answer is None]:
            for number in missing:
                self._callers[number].send(bodies[number], given[number])
            for number in missing:
                body, found = self._callers[number].receive()
                answer = msgspec.msgpack.decode(body, type=messages.Answer)
                if isinstance(answer, messages.Refused):
                    raise WorkerError(f"parameter server {number} refuses: {answer.problem}")
                if isinstance(answer, messages.NotYet):
                    waited = True
                    now = time.perf_counter()
                    if now - told > _SAY_SECONDS:
                        told = now
                        self._place.say(f"waits for {answer.why}, {now - began:.0f} s")
                    continue
                answers[number] = answer, found
        pulse.mark(phase)
        if waited:
            self.peers.traffic.waiting_seconds += time.perf_counter() - began
        return [answer for answer in answers if answer is not None]

    def _facts_of_run(self) -> str:
        facts = {key: value for key, value in self.remember().items() if key != "policy"}
        text = json.dumps(facts)
        return text if len(text) < _LARGEST_FACTS else json.dumps({"progress": facts["progress"]})

    def _clock_of(self, step: int) -> int:
        """Pushes of a replica that has taken so many steps; the last push may be of fewer."""
        return -(-step // self._every) if step == self._steps else step // self._every


def _decay_of(optimizer: OptimizerSection | Any) -> float:
    return float(getattr(optimizer, "weight_decay", 0.0))


def _regions(
    layout: FlatLayout, spans: list[Span], decay: float
) -> list[tuple[messages.Region, ...]]:
    """The regions of each span, counted from its start, with their weight decay."""
    found = []
    for span in spans:
        regions = []
        for name, region in layout.regions.items():
            part = region.meet(span)
            if part is not None and name != "frozen":
                start, stop = part.start - span.start, part.stop - span.start
                regions.append(messages.Region(start, stop, decay if name == "decay" else 0.0))
        found.append(tuple(regions))
    return found
