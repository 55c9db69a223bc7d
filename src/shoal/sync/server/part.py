"""The part of the parameters that one server holds for one position: values, optimizer, pushes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shoal.comm.codec.kinds import encoding
from shoal.config.optimizers import OptimizerSection
from shoal.config.server import AsTrained
from shoal.config.server import Asynchronous as AsynchronousSection
from shoal.config.server import Bounded as BoundedSection
from shoal.config.sync import Server as Section
from shoal.sync.server.consistency import Asynchronous, Bounded, Consistency, Quorum, Update
from shoal.sync.server.messages import Reads, Region
from shoal.sync.server.optimizers import ServerOptimizer, create


@dataclass(frozen=True)
class Settings:
    """How a server treats what it gets."""

    section: Section
    trained: OptimizerSection
    """`train.optimizer`."""
    replicas: int

    @property
    def fingerprint(self) -> str:
        """What must be the same for a state on the disk to be gone on with."""
        section = self.section.model_dump(mode="json", exclude={"replay"})
        trained = self.trained.model_dump(mode="json")
        return json.dumps([section, trained, self.replicas], sort_keys=True)

    def decoded(self, sent: Tensor, *, numel: int) -> Tensor:
        """A push as it arrived -> [numel]. Raises ValueError for one that cannot be."""
        codec = encoding(self.section.codec)
        padded = numel if codec is None else codec.part(numel, size=1)
        wanted = numel if codec is None else codec.num_bytes(padded)
        if tuple(sent.shape) != (wanted,) or (codec is not None and sent.dtype != torch.uint8):
            raise ValueError(f"expected a push of {wanted} elements, got {list(sent.shape)}")
        return sent if codec is None else codec.decode(sent.view(1, -1), numel=padded)[0, :numel]

    @property
    def optimizer(self) -> Any:
        """The section of the optimizer that the server runs."""
        own = self.section.optimizer
        return self.trained if isinstance(own, AsTrained) else own

    def consistency(self) -> Consistency:
        """A new state machine."""
        section = self.section.consistency
        if isinstance(section, AsynchronousSection):
            return Asynchronous(self.replicas)
        if isinstance(section, BoundedSection):
            return Bounded(self.replicas, staleness=section.staleness)
        return Quorum(self.replicas, least=section.least)


@dataclass(frozen=True)
class _Pushed:
    gradient: Tensor | None
    rate: float


@dataclass
class Part:
    """One part. Not filled until `fill` or `restore` is called."""

    settings: Settings
    regions: tuple[Region, ...]
    values: Tensor
    """[numel], changed in place."""
    filled: bool = False
    lives: dict[int, int] = field(default_factory=dict)
    facts: dict[int, str] = field(default_factory=dict)
    """What the last push of each replica told."""
    reads: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Step -> digest and number of the samples read for it so far, of all replicas together."""
    stop_after: int | None = None
    """Clock with which all stop; under `asynchronous` only that they do."""

    def __post_init__(self) -> None:
        self.consistency = self.settings.consistency()
        asynchronous = isinstance(self.consistency, Asynchronous)
        self.optimizer: ServerOptimizer = create(
            self.settings.optimizer,
            self.values,
            self.regions,
            pushes=self.settings.replicas if asynchronous else 1,
        )
        self._waiting: dict[tuple[int, int], _Pushed] = {}
        self._pulled: dict[int, Tensor] = {}
        """What each replica computes its gradient at, for delay compensation."""

    # --- events; the same in the same order lead to the same bits

    def fill(
        self,
        tensors: Sequence[Tensor],
        *,
        clocks: Mapping[int, int],
        version: int,
        counts: Mapping[str, int],
        facts: Mapping[int, str],
        reads: Reads = (),
    ) -> None:
        """Begin with the values and optimizer states of `tensors`. Raises ValueError."""
        wanted = [self.values, *self.optimizer.states.values()]
        shapes = [tuple(each.shape) for each in tensors]
        if shapes != [tuple(each.shape) for each in wanted]:
            raise ValueError(f"expected {len(wanted)} tensors of {self.values.numel()}: {shapes}")
        for own, given in zip(wanted, tensors):
            own.copy_(given)
        self.optimizer.restore(counts)
        self.consistency.begin(clocks, version=version)
        self.facts, self.reads = dict(facts), {}
        self.account(reads)
        self.filled = True

    def join(self, replica: int, *, life: int) -> int:
        """A worker speaks for `replica` from now on; its clock."""
        self.lives[replica] = life
        self._pulled.pop(replica, None)
        return self.consistency.join(replica)

    def leave(self, replica: int) -> None:
        """Its worker is gone."""
        self._apply(self.consistency.leave(replica))

    def pull(self, replica: int) -> Tensor:
        """The values, which the replica's next push is computed from."""
        if self.settings.section.delay_compensation:
            self._pulled[replica] = self.values.clone()
        return self.values

    def push(
        self,
        replica: int,
        gradient: Tensor | None,
        *,
        weight: float,
        version: int,
        rate: float,
        facts: str = "",
        reads: Reads = (),
    ) -> int:
        """The push of the replica's present clock; its staleness."""
        consistency = self.consistency
        key = (replica, consistency.members[replica].clock)
        staleness = consistency.staleness(replica, version=version)
        self._waiting[key] = _Pushed(gradient, rate)
        self.facts[replica] = facts
        self.account(reads)
        self._apply(consistency.push(replica, weight=weight, version=version))
        return staleness

    def account(self, reads: Reads) -> None:
        """Add up what was read; sums wrap around at 64 bits, as everywhere (data/verify.py)."""
        for step, digest, count in reads:
            known, others = self.reads.get(step, (0, 0))
            total = (known + digest + (1 << 63)) % (1 << 64) - (1 << 63)
            self.reads[step] = total, others + count

    def finish(self, replica: int) -> None:
        """Nothing follows from the replica."""
        self._apply(self.consistency.finish(replica))

    def close(self) -> None:
        """The time of grace of a round is over."""
        self._apply(self.consistency.close())

    def stop(self, replica: int) -> int:
        """The run is to stop; the clock with which that replica does."""
        if self.stop_after is None:
            members = [m for m in self.consistency.members.values() if m.alive and not m.done]
            self.stop_after = max((member.clock for member in members), default=0) + 1
        return self.stops_after(replica)

    def stops_after(self, replica: int) -> int:
        """The clock with which `replica` stops; -1: the recipe's."""
        if self.stop_after is None:
            return -1
        if isinstance(self.consistency, Asynchronous):  # nobody's share depends on the others
            return self.consistency.members[replica].clock
        return self.stop_after

    # --- applying

    @torch.no_grad()
    def _apply(self, updates: Sequence[Update]) -> None:
        for update in updates:
            pushes = [self._waiting.pop((t.replica, t.clock)) for t in update.pushes]
            total = sum(taken.weight for taken in update.pushes)
            gradient: Tensor | None = None
            for taken, pushed in zip(update.pushes, pushes):
                if pushed.gradient is None:
                    continue
                part = self._compensated(taken.replica, pushed.gradient)
                weight = taken.weight / total
                if self.settings.section.staleness_aware:
                    weight /= max(1, taken.staleness)
                part = part if weight == 1.0 else part * weight
                gradient = part if gradient is None else gradient.add_(part)
            if gradient is not None:
                self.optimizer.apply(gradient, rate=pushes[0].rate, share=update.share)

    def _compensated(self, replica: int, gradient: Tensor) -> Tensor:
        """DC-ASGD (Zheng et al., arXiv 1609.08326), equation 7: g + lambda g*g*(w_now - w_then)."""
        then = self._pulled.get(replica)
        if then is None:
            return gradient
        moved = self.values - then
        factor = self.settings.section.delay_compensation
        return gradient.addcmul(gradient.square(), moved, value=factor)

    # --- what is kept

    def kept(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything of the part, pending pushes too: for `restore`. Numbers and tensors."""
        tensors = {"values": self.values, **self.optimizer.states}
        waiting = []
        for (replica, clock), pushed in self._waiting.items():
            waiting.append([replica, clock, pushed.rate])
            if pushed.gradient is not None:
                tensors[f"push/{replica}/{clock}"] = pushed.gradient
        tensors |= {f"pulled/{replica}": each for replica, each in self._pulled.items()}
        numbers = {
            "settings": self.settings.fingerprint,
            "dtype": str(self.values.dtype).removeprefix("torch."),
            "regions": [[r.start, r.stop, r.weight_decay] for r in self.regions],
            "consistency": self.consistency.state(),
            "counts": self.optimizer.counts(),
            "lives": {str(replica): life for replica, life in self.lives.items()},
            "facts": {str(replica): text for replica, text in self.facts.items()},
            "reads": self.kept_reads(),
            "waiting": waiting,
            "stop_after": self.stop_after,
        }
        return numbers, tensors

    def kept_reads(self, *, written_steps: int = 0) -> list[list[int]]:
        """What was read; that of the first steps, which is on the disk, is forgotten."""
        self.reads = {step: read for step, read in self.reads.items() if step >= written_steps}
        return [[step, *read] for step, read in sorted(self.reads.items())]

    def restore(self, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Stand where `kept` says."""
        self.values.copy_(tensors["values"])
        for name, state in self.optimizer.states.items():
            state.copy_(tensors[name])
        self.optimizer.restore(numbers["counts"])
        self.consistency.restore(numbers["consistency"])
        self.lives = {int(replica): life for replica, life in numbers["lives"].items()}
        self.facts = {int(replica): text for replica, text in numbers["facts"].items()}
        self.reads = {step: (digest, count) for step, digest, count in numbers["reads"]}
        self._waiting = {
            (replica, clock): _Pushed(tensors.get(f"push/{replica}/{clock}"), rate)
            for replica, clock, rate in numbers["waiting"]
        }
        self._pulled = {
            int(name.partition("/")[2]): each
            for name, each in tensors.items()
            if name.startswith("pulled/")
        }
        self.stop_after = numbers["stop_after"]
        self.filled = True
