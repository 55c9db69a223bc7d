"""Seconds of each stage per micro batch, and of what a step does once: reduce and update."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from shoal.plan.cost.compute import Compute, Cut, Pass
from shoal.plan.cost.constants import DEFAULT, Constants
from shoal.plan.cost.memory import stage_parameters
from shoal.plan.cost.traffic import Group, Traffic
from shoal.plan.hardware import Cluster
from shoal.plan.software import SHOAL, Software
from shoal.plan.workload import Candidate, Workload, stage_blocks

CODEC_SHARE = {
    "none": 1.0,
    "bf16": 0.5,
    "fp16": 0.5,
    "int8": 0.254,  # with a scale of 4 bytes for 256 values
    "int4": 0.133,
    "sign": 0.047,
    "topk": 0.02,  # one value in a hundred and its index, both 4 bytes
    "powersgd": 0.1,
}
"""Bytes on the wire over float32 bytes."""


@dataclass(frozen=True)
class Work:
    """Seconds per micro batch of one stage, by part."""

    passes: Pass
    recompute: float
    tensor: float
    context: float
    expert: float
    shard: float
    pipeline: float
    host: float

    @property
    def total(self) -> float:
        return (
            self.passes.total
            + self.recompute
            + self.tensor
            + self.context
            + self.expert
            + self.shard
            + self.pipeline
            + self.host
        )


@dataclass(frozen=True)
class Pricing:
    """Times candidates of one workload on one cluster; remembers the blocks it has timed."""

    workload: Workload
    cluster: Cluster
    software: Software = SHOAL
    constants: Constants = DEFAULT
    _blocks: dict[tuple[int, int, int, int, bool], Pass] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )
    _cuts: dict[int, list[int]] = field(default_factory=dict, init=False, compare=False, repr=False)
    _largest: dict[tuple[int, int, int], float] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    @cached_property
    def compute(self) -> Compute:
        """Times on the slowest device of the cluster: a synchronous step waits for it."""
        return Compute(self.workload, self.cluster.slowest, self.software, self.constants)

    @cached_property
    def traffic(self) -> Traffic:
        """Times over the cluster's links."""
        return Traffic(self.cluster, self.constants)

    def stages(self, candidate: Candidate) -> list[int]:
        """Blocks of each stage."""
        stages = candidate.layout.pipeline
        if stages not in self._cuts:
            self._cuts[stages] = stage_blocks(
                self.workload.facts,
                stages=stages,
                sequence_tokens=self.workload.sequence_tokens,
                balanced=self.software.balanced_stages,
            )
        return self._cuts[stages]

    def floor_seconds(self, candidate: Candidate) -> float:
        """A lower bound of the step: the compute of the average stage, nothing else."""
        facts = self.workload.facts
        share = facts.expert_layers / facts.layers
        dense = self._block(candidate, experts=False).total if share < 1 else 0.0
        routed = self._block(candidate, experts=True).total if share else 0.0
        block = (1 - share) * dense + share * routed
        stages = candidate.layout.pipeline
        return candidate.micro_batches(self.workload) * block * facts.layers / stages

    def _block(self, candidate: Candidate, *, experts: bool) -> Pass:
        layout = candidate.layout
        tokens = candidate.micro_batch_samples * self.workload.sequence_tokens // layout.context
        key = (tokens, layout.tensor, layout.context, layout.expert, experts)
        if key not in self._blocks:
            cut = Cut(tokens, layout.tensor, layout.context, layout.expert)
            self._blocks[key] = self.compute.block(cut, experts=experts)
        return self._blocks[key]

    def works(self, candidate: Candidate) -> list[Work]:
        """The work of each stage; stages of equal content share one computation."""
        blocks = self.stages(candidate)
        facts, layout = self.workload.facts, candidate.layout
        tokens = candidate.micro_batch_samples * self.workload.sequence_tokens / layout.context
        share = facts.expert_layers / facts.layers
        dense = self._block(candidate, experts=False) if share < 1 else Pass()
        routed = self._block(candidate, experts=True) if share else Pass()
        block = Pass(
            (1 - share) * dense.forward + share * routed.forward,
            (1 - share) * dense.backward + share * routed.backward,
        )
        tensor, context, expert = self._block_traffic(candidate, tokens=tokens, block=block)
        part = self._selective(candidate) + self.software.selective_share * block.forward
        repeated = {"none": 0.0, "selective": part, "full": block.forward}
        again = repeated[candidate.recompute] * candidate.recompute_share
        send = self._sends(candidate, tokens=tokens)
        waiting = self._host_waiting(
            candidate, busy=block.total + again + tensor + context + expert
        )
        known: dict[tuple[int, bool, bool], Work] = {}
        works = []
        for index, count in enumerate(blocks):
            first, last = index == 0, index == len(blocks) - 1
            if (count, first, last) not in known:
                passes = Pass(count * block.forward, count * block.backward)
                if first:
                    passes += self.compute.embedding(tokens=tokens)
                if last:
                    passes += self.compute.head(tokens=tokens, tensor=layout.tensor)
                each = self.software.accumulated(self.workload.precision)
                if each:
                    held = stage_parameters(
                        facts, blocks=count, candidate=candidate, first=first, last=last
                    )
                    split = 1 if candidate.level == "optimizer" else candidate.state_split
                    passes += Pass(0.0, self.compute.stream(each * held / split))
                full = candidate.recompute == "full"
                refetch = 1 + 0.5 * candidate.recompute_share * full
                known[count, first, last] = Work(
                    passes,
                    count * again,
                    count * tensor * refetch,
                    count * context * refetch,
                    count * expert * refetch,
                    self._fetches(candidate, passes=passes, blocks=count),
                    send,
                    count * waiting,
                )
            works.append(known[count, first, last])
        return works

    def _host_waiting(self, candidate: Candidate, *, busy: float) -> float:
        """Seconds per block and micro batch in which the device waits for the host."""
        layout = candidate.layout
        calls = (10 if layout.tensor > 1 else 0) + (4 if layout.expert > 1 else 0)
        calls += 3 * (layout.context - 1)
        if layout.shard > 1 and candidate.level != "optimizer":
            calls += 3
        return self.compute.host_waiting(
            collectives=calls,
            tensor=layout.tensor,
            repeated=4 / 3 if candidate.recompute == "full" else 1.0,
            busy=busy,
        )

    def _selective(self, candidate: Candidate) -> float:
        """Recomputing the attention core; nothing where the kernel does it anyway."""
        if self.software.flash:
            return 0.0
        layout = candidate.layout
        tokens = candidate.micro_batch_samples * self.workload.sequence_tokens // layout.context
        return self.compute.attention(Cut(tokens, layout.tensor, layout.context)).forward

    def _block_traffic(
        self, candidate: Candidate, *, tokens: float, block: Pass
    ) -> tuple[float, float, float]:
        """Exposed seconds per block and micro batch of the tensor, context and expert axes."""
        facts, layout, traffic = self.workload.facts, candidate.layout, self.traffic
        whole = 2.0 * tokens * facts.hidden
        tensor = 0.0
        if layout.tensor > 1:
            group = Group(layout.tensor)
            # Per pass two gathers and two reduce-scatters, or two all-reduces: the same bytes.
            # With sequence parallel the backward gathers both inputs once more (2205.05198).
            calls = 10 if self.software.sequence_parallel else 8
            one = traffic.collective("all-gather", group=group, num_bytes=whole)
            tensor = calls * one * (1 - self.software.overlap_tensor)
        context = 0.0
        if layout.context > 1:
            group = Group(layout.context, layout.tensor)
            size = facts.head_size + facts.value_head_size
            keys = 2.0 * tokens * facts.key_value_heads * size / layout.tensor
            # Keys and values go round once forward, and with their gradients once more backward
            # (ring attention, arXiv 2310.01889), behind the attention they feed.
            ring = traffic.collective("all-gather", group=group, num_bytes=keys * layout.context)
            hidden = self.compute.attention(Cut(int(tokens), layout.tensor, layout.context)).total
            context = max(0.0, 3 * ring - 0.8 * hidden) + self.constants.contention * ring
        expert = 0.0
        if layout.expert > 1:
            group = Group(layout.expert, layout.tensor)
            moved = whole * facts.experts_per_token / layout.tensor
            expert = 4 * traffic.collective("all-to-all", group=group, num_bytes=moved)
        return tensor, context, expert

    def _sends(self, candidate: Candidate, *, tokens: float) -> float:
        """Point-to-point seconds per micro batch of one stage: activations and gradients."""
        layout = candidate.layout
        if layout.pipeline == 1:
            return 0.0
        split = layout.tensor if self.software.sequence_parallel else 1
        stride = layout.workers // layout.pipeline
        one = self.traffic.send(
            Group(layout.pipeline, stride),
            num_bytes=2.0 * tokens * self.workload.facts.hidden / split,
        )
        host = self.software.send_host_seconds
        return 2 * candidate.chunks * (one * (1 - self.software.overlap_sends) + host)

    def _fetches(self, candidate: Candidate, *, passes: Pass, blocks: int) -> float:
        """Exposed seconds per micro batch of gathering parameters and reducing gradients."""
        layout, software = candidate.layout, self.software
        if layout.shard == 1 or candidate.level == "optimizer":
            return 0.0
        group = Group(candidate.state_split, layout.tensor)
        facts = self.workload.facts
        parameters = blocks * facts.block_parameters / layout.tensor
        gather = blocks * self.traffic.collective(
            "all-gather",
            group=group,
            num_bytes=software.weight_bytes * facts.block_parameters / layout.tensor,
            pieces=software.gathers_per_block,
        )
        reduce = self.traffic.collective(
            "reduce-scatter",
            group=group,
            num_bytes=software.reduce_bytes * parameters,
            pieces=blocks * software.gathers_per_block,
        )
        again = gather if candidate.level == "parameters" else 0.0
        backward = passes.backward + (passes.forward if candidate.recompute == "full" else 0.0)
        hidden = software.overlap_shard
        return (
            max(0.0, gather - hidden * passes.forward)
            + max(0.0, again + reduce - hidden * backward)
            + self.constants.contention * (gather + again + reduce)
        )

    def reduction(self, candidate: Candidate, *, backward: float) -> tuple[float, float]:
        """Exposed seconds per step of (shard, replicate): gradients out, parameters back.

        A policy that agrees every k steps pays a k-th of the exchange.
        """
        layout, software = candidate.layout, self.software
        held = self._largest_stage(candidate)
        if self.workload.trainable != "all":
            return 0.0, 0.0
        stride = layout.tensor * layout.context
        shard = 0.0
        if layout.shard > 1 and candidate.level == "optimizer":
            group = Group(layout.shard * layout.context, layout.tensor)
            out = self.traffic.collective(
                "reduce-scatter",
                group=group,
                num_bytes=software.reduce_bytes * held,
                pieces=software.reduce_bytes * held / software.bucket_bytes,
            )
            back = self.traffic.collective(
                "all-gather",
                group=group,
                num_bytes=software.weight_bytes * held,
                pieces=software.weight_bytes * held / software.bucket_bytes,
            )
            shard = max((1 - software.overlap_gradients) * (out + back), out + back - backward)
        replicate = 0.0
        # Ranks of the context axis see other tokens of the same rows: without a shard axis to
        # take them in, their gradients are summed together with those of the replicas.
        copies = layout.replicate * layout.context * layout.shard // candidate.state_split
        if copies > 1:
            near = layout.tensor if layout.shard == 1 else stride * layout.shard
            group = Group(copies, near)
            each = software.reduce_bytes * CODEC_SHARE.get(candidate.codec, 1.0)
            out = self.traffic.collective(
                "all-reduce", group=group, num_bytes=each * held / layout.shard
            )
            if candidate.policy == "every-step":
                replicate = max((1 - software.overlap_gradients) * out, out - backward)
            else:
                replicate = out / max(1, candidate.every_steps)
        return shard, replicate

    def update(self, candidate: Candidate) -> float:
        """Seconds of the optimizer on the stage with most parameters."""
        if self.workload.trainable != "all":
            return 0.0
        return self.compute.update(self._largest_stage(candidate) / candidate.state_split)

    def _largest_stage(self, candidate: Candidate) -> float:
        """Parameters per device of the stage that has most, before the shard axis."""
        layout = candidate.layout
        key = (layout.pipeline, layout.tensor, layout.expert)
        if key not in self._largest:
            blocks = self.stages(candidate)
            end = len(blocks) - 1
            self._largest[key] = max(
                stage_parameters(
                    self.workload.facts,
                    blocks=count,
                    candidate=candidate,
                    first=first,
                    last=last,
                )
                for count, first, last in {
                    (count, at == 0, at == end) for at, count in enumerate(blocks)
                }
            )
        return self._largest[key]
