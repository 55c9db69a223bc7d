"""Time of one block, embedding, head and update on one device: products, attention, traffic."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from shoal.plan.cost.constants import Constants
from shoal.plan.hardware import Device
from shoal.plan.software import Software
from shoal.plan.workload import Workload, attended_tokens

_MODERN = {"hopper", "blackwell"}
_TILE_ROWS, _TILE_COLUMNS = 128, 256  # the tile of large products on Ampere and later (CUTLASS)


@dataclass(frozen=True)
class Pass:
    """Seconds of the forward and of the backward pass of something, on one device."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Pass) -> Pass:
        return Pass(self.forward + other.forward, self.backward + other.backward)

    @property
    def total(self) -> float:
        """Both passes."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Cut:
    """The part of a block that one device computes for one micro batch.

    `tokens` are those of the micro batch on this device (context already divided);
    `tensor`, `context` and `expert` are the degrees.
    """

    tokens: int
    tensor: int = 1
    context: int = 1
    expert: int = 1


@dataclass(frozen=True)
class Compute:
    """Times of one workload on one kind of device under one kind of software."""

    workload: Workload
    device: Device
    software: Software
    constants: Constants

    def sustained_rate(self, precision: str) -> float:
        """FLOPs per second of large products in a long run."""
        table = {
            "volta": self.constants.sustained_volta,
            "ampere": self.constants.sustained_ampere,
            "hopper": self.constants.sustained_hopper,
            "blackwell": self.constants.sustained_blackwell,
        }
        share = table.get(self.device.generation, self.constants.sustained_other)
        if precision in {"fp8", "fp4"}:
            share *= self.constants.sustained_fp8
        return self.device.rate(precision) * share

    def product(self, *, rows: float, columns: float, depth: float, precision: str) -> float:
        """Seconds of a [rows, depth] x [depth, columns] product.

        The larger of its time at the compute rate (lowered by unfilled waves of tiles and by
        shallow depth) and at the memory rate.
        """
        constants = self.constants
        flops = 2.0 * rows * columns * depth
        rate = self.sustained_rate(precision)
        seconds = flops / rate
        if self.device.multiprocessors:
            each = rate / self.device.multiprocessors
            beside = constants.tile_seconds * each / (2.0 * _TILE_ROWS * _TILE_COLUMNS)
            seconds *= 1 + beside / depth
            tiles = ceil(rows / _TILE_ROWS) * ceil(columns / _TILE_COLUMNS)
            waves = tiles / self.device.multiprocessors
            seconds *= 1 + constants.wave_loss * (ceil(waves) / waves - 1)
        traffic = 2.0 * (rows * depth + depth * columns + rows * columns)
        return max(seconds, self.stream(traffic))

    def layer(
        self, *, rows: float, columns: float, depth: float, precision: str | None = None
    ) -> Pass:
        """A linear layer: forward, and backward for its input and (if trained) its weight."""
        chosen = precision or self.workload.precision
        forward = self.product(rows=rows, columns=columns, depth=depth, precision=chosen)
        backward = self.product(rows=rows, columns=depth, depth=columns, precision=chosen)
        if self.workload.trainable == "all":
            backward += self.product(rows=depth, columns=columns, depth=rows, precision=chosen)
        return Pass(forward, backward)

    def stream(self, num_bytes: float) -> float:
        """Seconds to move `num_bytes` through device memory."""
        rate = self.device.memory_bytes_per_second * self.constants.memory_share
        return num_bytes / rate

    def attention(self, cut: Cut) -> Pass:
        """The scores and the weighted sum of one block; flash kernels skip what is masked."""
        facts, workload = self.workload.facts, self.workload
        heads = facts.heads / cut.tensor
        size = facts.head_size + facts.value_head_size
        keys = attended_tokens(
            facts, sequence_tokens=workload.sequence_tokens, halved=self.software.flash
        )
        flops = 2.0 * cut.tokens * keys * heads * size
        if not self.software.flash:
            rate = self.sustained_rate("bf16") * facts.head_size / (facts.head_size + 64.0)
            scores = cut.tokens * workload.sequence_tokens * heads
            traffic = self.stream(self.constants.score_bytes * scores) / 3
            return Pass(flops / rate + traffic, 2 * flops / rate + 2 * traffic)
        share = self.device.attention_share
        if self.software.attention_version == 1:
            share *= self.constants.first_attention
        elif self.software.attention_version == 3 and self.device.generation in _MODERN:
            share *= self.constants.modern_attention
        row = workload.sequence_tokens / cut.context
        # Small heads leave the matrix units idle between exponentials: 128 is the design point.
        narrow = min(1.0, facts.head_size / (facts.head_size + 32.0) * 1.25)
        share *= narrow * row / (row + self.constants.half_row)
        peak = (
            self.device.peak.get("bf16")
            or self.device.peak.get("fp16")
            or (self.device.peak["fp32"])
        )
        forward = flops / (peak * share)
        # Five products against two, and more of them bound by shared memory (arXiv 2307.08691).
        return Pass(forward, 2.5 * forward)

    def block(self, cut: Cut, *, experts: bool = False) -> Pass:
        """One block without communication: products, attention, elementwise work."""
        facts = self.workload.facts
        queries = facts.heads * facts.head_size / cut.tensor
        values = facts.heads * facts.value_head_size / cut.tensor
        groups = max(1.0, facts.key_value_heads / cut.tensor)
        keys = groups * (facts.head_size + facts.value_head_size)
        work = self.layer(rows=cut.tokens, columns=queries + keys, depth=facts.hidden)
        work += self.layer(rows=cut.tokens, columns=facts.hidden, depth=values)
        work += self.attention(cut)
        work += self._experts(cut) if experts else self._feed_forward(cut)
        return work + self._elementwise(cut, experts=experts)

    def _feed_forward(self, cut: Cut) -> Pass:
        facts = self.workload.facts
        inner = facts.feed_forward / cut.tensor
        up = (2 if facts.gated else 1) * inner
        work = self.layer(rows=cut.tokens, columns=up, depth=facts.hidden)
        return work + self.layer(rows=cut.tokens, columns=facts.hidden, depth=inner)

    def _experts(self, cut: Cut) -> Pass:
        """Routed experts as grouped products, plus the shared expert; routing is balanced."""
        facts = self.workload.facts
        local = max(1.0, facts.experts / cut.expert)
        rows = cut.tokens * facts.experts_per_token / local
        inner = facts.expert_feed_forward / cut.tensor
        one = self.layer(rows=rows, columns=2 * inner, depth=facts.hidden)
        one += self.layer(rows=rows, columns=facts.hidden, depth=inner)
        work = Pass(one.forward * local, one.backward * local)
        if facts.shared_feed_forward:
            shared = facts.shared_feed_forward / cut.tensor
            work += self.layer(rows=cut.tokens, columns=2 * shared, depth=facts.hidden)
            work += self.layer(rows=cut.tokens, columns=facts.hidden, depth=shared)
        return work

    def _elementwise_bytes(self, cut: Cut, *, experts: bool = False) -> tuple[float, float]:
        """Bytes that fused kernels of norms, rotations and activations move, (forward, backward).

        Per token, forward: two norms (read, write) and two residual sums, 20 per hidden element;
        rotation 4 per element of queries, keys and values; a gated activation 6 per inner
        element, a plain one 4. Backward: 30, 4, 10, 6.
        """
        facts = self.workload.facts
        hidden, widths, inner = self._widths(cut, experts=experts)
        dropped = 6.0 if self.software.dropout else 0.0
        forward = (20 + dropped) * hidden + 4 * widths + (6 if facts.gated else 4) * inner
        backward = (30 + dropped) * hidden + 4 * widths + (10 if facts.gated else 6) * inner
        return forward * cut.tokens, backward * cut.tokens

    def _widths(self, cut: Cut, *, experts: bool) -> tuple[float, float, float]:
        """Elements per token on one device: hidden; queries, keys and values; feed-forward."""
        facts = self.workload.facts
        hidden = facts.hidden / (cut.tensor if self.software.sequence_parallel else 1)
        groups = max(1.0, facts.key_value_heads / cut.tensor)
        widths = facts.heads * facts.head_size / cut.tensor
        widths += groups * (facts.head_size + facts.value_head_size)
        inner = facts.feed_forward
        if experts:
            inner = facts.experts_per_token * facts.expert_feed_forward + facts.shared_feed_forward
        return hidden, widths, inner / cut.tensor

    def _elementwise(self, cut: Cut, *, experts: bool) -> Pass:
        """Norms, residuals, rotations and activations, bound by memory."""
        forward, backward = self._elementwise_bytes(cut, experts=experts)
        moves = self.software.elementwise
        work = Pass(self.stream(moves * forward), self.stream(moves * backward))
        extra = 0.0
        if self.workload.precision in {"fp8", "fp4"}:
            each = self.constants.cast_bytes
            if self.workload.precision == "fp4" and "fp4" in self.device.peak:
                each = self.constants.narrow_cast_bytes
            hidden, widths, inner = self._widths(cut, experts=experts)
            extra += each * (2 * hidden + widths + 2 * inner)
        if experts:
            extra += 8.0 * self.workload.facts.experts_per_token * self.workload.facts.hidden
        moved = self.stream(extra * cut.tokens)
        return work + Pass(moved, moved)

    def host_waiting(self, *, collectives: int, tensor: int, repeated: float, busy: float) -> float:
        """Seconds per block in which the device, `busy` so long, waits for the host to start it.

        The host's time for a block (both passes, `repeated` with recompute) is a lower bound of
        the block's.
        """
        software = self.software
        block = software.block_host_seconds * (1.6 if self.workload.facts.experts else 1.0)
        each = software.collective_host_seconds + software.collective_rank_seconds * tensor
        return max(0.0, repeated * (block + collectives * each) - busy)

    def head(self, *, tokens: float, tensor: int) -> Pass:
        """Final projection and loss; stays in 16 bits when the blocks run in fewer."""
        facts = self.workload.facts
        columns = facts.vocabulary / tensor
        precision = self.workload.precision
        precision = "bf16" if precision in {"fp8", "fp4"} else precision
        work = self.layer(rows=tokens, columns=columns, depth=facts.hidden, precision=precision)
        traffic = self.stream(self.software.logit_traffic * tokens * columns)
        return work + Pass(traffic / 2, traffic / 2)

    def embedding(self, *, tokens: float) -> Pass:
        """Lookup and its scattered gradient."""
        traffic = self.stream(4.0 * tokens * self.workload.facts.hidden)
        return Pass(traffic, 2 * traffic)

    def update(self, parameters: float) -> float:
        """Seconds of the optimizer step over `parameters` local elements."""
        constants = self.constants
        each = constants.update_bytes if self.software.fused else constants.eager_update_bytes
        return self.stream(each * parameters)
