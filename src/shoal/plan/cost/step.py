"""Predicts one optimizer step: seconds and bytes of a workload cut one way on a cluster."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from shoal.plan.cost.compute import Compute, Cut, Pass
from shoal.plan.cost.constants import DEFAULT, Constants
from shoal.plan.cost.memory import Memory, Stage, memory_of, stage_parameters
from shoal.plan.cost.pipeline import step_seconds
from shoal.plan.cost.traffic import Group, Traffic
from shoal.plan.hardware import Cluster
from shoal.plan.software import SHOAL, Software
from shoal.plan.workload import Candidate, Workload, flops_per_token, stage_blocks


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicted time and memory of one step.

    `seconds` by part: compute, recompute, tensor, context, expert, shard, replicate, pipeline,
    bubble, update, host; communication is what is not hidden. `first`, `last` and `peak` are the
    memory of a device of the first stage, of the last, and of the one that needs most.
    """

    candidate: Candidate
    seconds: dict[str, float]
    first: Memory
    last: Memory
    tokens: int
    workers: int
    model_flops: float
    peak_flops_per_second: float
    device_memory_bytes: float
    sent_bytes: dict[str, float] = field(default_factory=dict)

    @property
    def step_seconds(self) -> float:
        """Seconds per optimizer step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Trained tokens per second of the whole cluster."""
        return self.tokens / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs over peak FLOPs, attention counted in full."""
        return self.model_flops / (self.step_seconds * self.workers * self.peak_flops_per_second)

    @property
    def peak(self) -> Memory:
        """Memory of the device that needs most."""
        return max(self.first, self.last, key=lambda memory: memory.total)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the memory of the smallest device."""
        return self.peak.total <= self.device_memory_bytes

    @property
    def exposed_seconds(self) -> float:
        """Communication that compute does not hide."""
        axes = ("tensor", "context", "expert", "shard", "replicate", "pipeline")
        return sum(self.seconds.get(axis, 0.0) for axis in axes)


@dataclass(frozen=True)
class _Work:
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
class Estimator:
    """Predicts candidates of one workload on one cluster; remembers the blocks it has timed."""

    workload: Workload
    cluster: Cluster
    software: Software = SHOAL
    constants: Constants = DEFAULT
    _blocks: dict[tuple[int, int, int, int, bool], Pass] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )
    _cuts: dict[int, list[int]] = field(default_factory=dict, init=False, compare=False, repr=False)

    @cached_property
    def compute(self) -> Compute:
        """Times on the slowest device of the cluster: a synchronous step waits for it."""
        return Compute(self.workload, self.cluster.slowest, self.software, self.constants)

    @cached_property
    def traffic(self) -> Traffic:
        """Times over the cluster's links."""
        return Traffic(self.cluster, self.constants)

    def predict(self, candidate: Candidate) -> Prediction:
        """Seconds and bytes of one step of `candidate`."""
        layout, workload = candidate.layout, self.workload
        blocks = self._stages(candidate)
        micro_batches = candidate.micro_batches(workload)
        works = self._works(blocks, candidate=candidate)
        piped = step_seconds(
            candidate.schedule,
            stages=[work.total for work in works],
            micro_batches=micro_batches,
            chunks=candidate.chunks,
        )
        slowest = max(works, key=lambda work: work.total)
        # Parts are those of an average stage; what the slowest adds to them is waiting.
        count = len(works)
        seconds = {
            "compute": sum(work.passes.total for work in works) / count * micro_batches,
            "recompute": sum(work.recompute for work in works) / count * micro_batches,
        }
        for part in ("tensor", "context", "expert", "shard", "pipeline", "host"):
            seconds[part] = sum(getattr(work, part) for work in works) / count * micro_batches
        seconds["bubble"] = max(0.0, piped - sum(seconds.values()))
        shard, replicate = self._reduction(
            blocks, candidate=candidate, backward=slowest.passes.backward
        )
        seconds["shard"] += shard
        seconds["replicate"] = replicate
        seconds["update"] = self._update(blocks, candidate=candidate)
        seconds["host"] += self.software.step_host_seconds
        first, last = self._memory(blocks, candidate=candidate)
        return Prediction(
            candidate=candidate,
            seconds=seconds,
            first=first,
            last=last,
            tokens=workload.tokens,
            workers=layout.workers,
            model_flops=self._step_flops,
            peak_flops_per_second=self._peak,
            device_memory_bytes=self.cluster.smallest_memory_bytes,
        )

    def memory_bytes(self, candidate: Candidate) -> float:
        """Bytes that the device with the highest peak needs; much cheaper than `predict`."""
        blocks = self._stages(candidate)
        return max(memory.total for memory in self._memory(blocks, candidate=candidate))

    def fits(self, candidate: Candidate, *, headroom: float = 0.0) -> bool:
        """Whether every device has the memory that `candidate` needs, and that share to spare."""
        limit = self.cluster.smallest_memory_bytes * (1 - headroom)
        return self.memory_bytes(candidate) <= limit

    def floor_seconds(self, candidate: Candidate) -> float:
        """A lower bound of the step: the compute of the average stage, nothing else."""
        facts = self.workload.facts
        share = facts.expert_layers / facts.layers
        dense = self._block(candidate, experts=False).total if share < 1 else 0.0
        routed = self._block(candidate, experts=True).total if share else 0.0
        block = (1 - share) * dense + share * routed
        stages = candidate.layout.pipeline
        return candidate.micro_batches(self.workload) * block * facts.layers / stages

    def _stages(self, candidate: Candidate) -> list[int]:
        stages = candidate.layout.pipeline
        if stages not in self._cuts:
            self._cuts[stages] = stage_blocks(
                self.workload.facts,
                stages=stages,
                sequence_tokens=self.workload.sequence_tokens,
                balanced=self.software.balanced_stages,
            )
        return self._cuts[stages]

    @cached_property
    def _step_flops(self) -> float:
        workload = self.workload
        each = flops_per_token(workload.facts, sequence_tokens=workload.sequence_tokens)
        return each * workload.tokens

    @cached_property
    def _peak(self) -> float:
        peaks = self.cluster.slowest.peak
        return peaks.get(self.workload.precision) or peaks.get("fp16") or peaks["fp32"]

    def _memory(self, blocks: list[int], *, candidate: Candidate) -> tuple[Memory, Memory]:
        def at(index: int) -> Memory:
            return memory_of(
                Stage(index=index, blocks=blocks[index], count=len(blocks)),
                workload=self.workload,
                candidate=candidate,
                software=self.software,
                constants=self.constants,
            )

        first = at(0)
        return first, first if len(blocks) == 1 else at(len(blocks) - 1)

    def _block(self, candidate: Candidate, *, experts: bool) -> Pass:
        layout = candidate.layout
        tokens = candidate.micro_batch_samples * self.workload.sequence_tokens // layout.context
        key = (tokens, layout.tensor, layout.context, layout.expert, experts)
        if key not in self._blocks:
            cut = Cut(tokens, layout.tensor, layout.context, layout.expert)
            self._blocks[key] = self.compute.block(cut, experts=experts)
        return self._blocks[key]

    def _works(self, blocks: list[int], *, candidate: Candidate) -> list[_Work]:
        """The work of each stage; stages of equal content share one computation."""
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
        repeated = {"none": 0.0, "selective": self._selective(candidate), "full": block.forward}
        again = repeated[candidate.recompute] * candidate.recompute_share
        send = self._sends(candidate, tokens=tokens)
        waiting = self._host_waiting(
            candidate, busy=block.total + again + tensor + context + expert
        )
        known: dict[tuple[int, bool, bool], _Work] = {}
        works = []
        for index, count in enumerate(blocks):
            first, last = index == 0, index == len(blocks) - 1
            if (count, first, last) not in known:
                passes = Pass(count * block.forward, count * block.backward)
                if first:
                    passes += self.compute.embedding(tokens=tokens)
                if last:
                    passes += self.compute.head(tokens=tokens, tensor=layout.tensor)
                if self.software.accumulate_bytes:
                    held = stage_parameters(
                        facts, blocks=count, candidate=candidate, first=first, last=last
                    )
                    adding = self.compute.stream(self.software.accumulate_bytes * held)
                    passes += Pass(0.0, adding)
                full = candidate.recompute == "full"
                refetch = 1 + 0.5 * candidate.recompute_share * full
                known[count, first, last] = _Work(
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
        needed = self.compute.host(
            collectives=calls, tensor=layout.tensor, experts=bool(self.workload.facts.experts)
        )
        if candidate.recompute == "full":
            needed *= 4 / 3
        return max(0.0, needed - busy)

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
            one = traffic.collective("all-gather", group, num_bytes=whole)
            tensor = calls * one * (1 - self.software.overlap_tensor)
        context = 0.0
        if layout.context > 1:
            group = Group(layout.context, layout.tensor)
            size = facts.head_size + facts.value_head_size
            keys = 2.0 * tokens * facts.key_value_heads * size / layout.tensor
            # Keys and values go round once forward, and with their gradients once more backward
            # (ring attention, arXiv 2310.01889), behind the attention they feed.
            ring = traffic.collective("all-gather", group, num_bytes=keys * layout.context)
            hidden = self.compute.attention(Cut(int(tokens), layout.tensor, layout.context)).total
            context = max(0.0, 3 * ring - 0.8 * hidden) + self.constants.contention * ring
        expert = 0.0
        if layout.expert > 1:
            group = Group(layout.expert, layout.tensor)
            moved = whole * facts.experts_per_token / layout.tensor
            expert = 4 * traffic.collective("all-to-all", group, num_bytes=moved)
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
            group,
            num_bytes=software.weight_bytes * facts.block_parameters / layout.tensor,
            pieces=software.gathers_per_block,
        )
        reduce = self.traffic.collective(
            "reduce-scatter",
            group,
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

    def _reduction(
        self, blocks: list[int], *, candidate: Candidate, backward: float
    ) -> tuple[float, float]:
        """Exposed seconds per step of (shard, replicate): gradients out, parameters back.

        A policy that agrees every k steps pays a k-th of the exchange.
        """
        layout, software = candidate.layout, self.software
        held = max(
            stage_parameters(
                self.workload.facts,
                blocks=count,
                candidate=candidate,
                first=index == 0,
                last=index == len(blocks) - 1,
            )
            for index, count in enumerate(blocks)
        )
        if self.workload.trainable != "all":
            return 0.0, 0.0
        stride = layout.tensor * layout.context
        shard = 0.0
        if layout.shard > 1 and candidate.level == "optimizer":
            group = Group(layout.shard * layout.context, layout.tensor)
            out = self.traffic.collective(
                "reduce-scatter",
                group,
                num_bytes=software.reduce_bytes * held,
                pieces=software.reduce_bytes * held / software.bucket_bytes,
            )
            back = self.traffic.collective(
                "all-gather",
                group,
                num_bytes=software.weight_bytes * held,
                pieces=software.weight_bytes * held / software.bucket_bytes,
            )
            shard = max((1 - software.overlap_gradients) * (out + back), out + back - backward)
        replicate = 0.0
        if layout.replicate > 1:
            group = Group(layout.replicate, stride * layout.shard)
            each = software.reduce_bytes * CODEC_SHARE.get(candidate.codec, 1.0)
            out = self.traffic.collective("all-reduce", group, num_bytes=each * held / layout.shard)
            if candidate.policy == "every-step":
                replicate = max((1 - software.overlap_gradients) * out, out - backward)
            else:
                replicate = out / max(1, candidate.every_steps)
        return shard, replicate

    def _update(self, blocks: list[int], *, candidate: Candidate) -> float:
        if self.workload.trainable != "all":
            return 0.0
        held = max(
            stage_parameters(
                self.workload.facts,
                blocks=count,
                candidate=candidate,
                first=index == 0,
                last=index == len(blocks) - 1,
            )
            for index, count in enumerate(blocks)
        )
        return self.compute.update(held / candidate.state_split)


CODEC_SHARE = {
    "none": 1.0,
    "bf16": 0.5,
    "fp16": 0.5,
    "int8": 0.25,
    "int4": 0.125,
    "topk": 0.02,  # one value in a hundred and its index, both 4 bytes
    "powersgd": 0.1,
}
"""Bytes on the wire over float32 bytes."""


def predict(
    candidate: Candidate,
    *,
    workload: Workload,
    cluster: Cluster,
    software: Software = SHOAL,
    constants: Constants = DEFAULT,
) -> Prediction:
    """Predicted seconds and bytes of one step; see `Prediction`."""
    return Estimator(workload, cluster, software, constants).predict(candidate)
