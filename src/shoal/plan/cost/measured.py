"""Times on one worker of a measured machine: the same parts as on a device, from its own clock."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.plan.cost.compute import Compute, Cut, Pass
from shoal.plan.cost.traffic import Group, Traffic, ring_bytes
from shoal.plan.rates import Rates

_FORWARD = 1 / 3.5  # share of attention's two passes: two products forward, five backward


@dataclass(frozen=True)
class MeasuredCompute(Compute):
    """Products, attention, traffic and update as they were timed; nothing is hidden from a CPU."""

    @property
    def _rates(self) -> Rates:
        rates = self.device.rates
        assert rates is not None, "made for measured devices only"
        return rates

    def layer(
        self, *, rows: float, columns: float, depth: float, precision: str | None = None
    ) -> Pass:
        """A linear layer: each of its three products has a rate of its own."""
        kinds = ["forward", "input", "weight"]
        each = [
            self._rates.product(
                kind,
                precision=precision or self.workload.precision,
                tokens=rows,
                columns=columns,
                depth=depth,
            )
            for kind in kinds[: 3 if self.workload.trainable == "all" else 2]
        ]
        return Pass(each[0], sum(each[1:]))

    def stream(self, num_bytes: float) -> float:
        """Seconds to move `num_bytes` through the memory that holds so many."""
        return self._rates.stream(num_bytes)

    def attention(self, cut: Cut) -> Pass:
        """The attention of one block, both passes, of all its heads."""
        facts = self.workload.facts
        row = self.workload.sequence_tokens / cut.context
        each = self._rates.attention(
            precision=self.workload.precision, row=row, head_size=facts.head_size
        )
        both = each * cut.tokens * cut.context * facts.heads / cut.tensor
        return Pass(_FORWARD * both, (1 - _FORWARD) * both)

    def _block(self, what: str) -> float:
        kind = "gated" if self.workload.facts.gated else "plain"
        return self._rates.block(what, precision=self.workload.precision, kind=kind)

    def elementwise(self, num_bytes: float) -> float:
        """Seconds of what fused kernels would do by moving `num_bytes`."""
        return self._block("byte") * num_bytes

    def host_waiting(self, *, collectives: int, tensor: int, repeated: float, busy: float) -> float:
        """Seconds of starting the operations of one block: no device runs meanwhile."""
        return repeated * self._block("host")

    def once(self) -> float:
        """Seconds that a micro batch costs whatever it holds."""
        return self._block("start")

    def head(self, *, tokens: float, tensor: int) -> Pass:
        """Final projection and loss, chunk by chunk."""
        facts = self.workload.facts
        columns = facts.vocabulary / tensor
        work = self.layer(rows=tokens, columns=columns, depth=facts.hidden)
        each = self._block("logit") * tokens * columns
        return work + Pass(each / 2, each / 2)

    def update(self, parameters: float) -> float:
        """Seconds of zeroing, norm, scaling and the optimizer over `parameters` elements."""
        return self._rates.update * parameters


@dataclass(frozen=True)
class MeasuredTraffic(Traffic):
    """Collectives of one machine's workers, from its timed sums of a flat gradient."""

    def collective(
        self, operation: str, *, group: Group, num_bytes: float, pieces: float = 1.0
    ) -> float:
        """Seconds of a collective; one that moves half of a sum's bytes takes half its time."""
        if group.size <= 1 or num_bytes <= 0:
            return 0.0
        rates = self.cluster.slowest.rates
        assert rates is not None, "made for measured devices only"
        share = ring_bytes(operation, num_bytes=1.0, size=group.size) / ring_bytes(
            "all-reduce", num_bytes=1.0, size=group.size
        )
        each = num_bytes / max(1.0, pieces)
        return share * max(1.0, pieces) * rates.reduce(each, ranks=group.size)

    def send(self, group: Group, *, num_bytes: float) -> float:
        """Seconds of one message: what a sum between two ranks sends."""
        return self.collective("all-gather", group=Group(2, group.stride), num_bytes=num_bytes)
