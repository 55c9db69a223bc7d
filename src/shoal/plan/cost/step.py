"""Predicts one optimizer step: seconds and bytes of a workload cut one way on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from shoal.plan.cost.constants import DEFAULT, Constants
from shoal.plan.cost.memory import Memory, Stage, memory_of
from shoal.plan.cost.pipeline import step_seconds
from shoal.plan.cost.work import Pricing
from shoal.plan.hardware import Cluster
from shoal.plan.software import SHOAL, Software
from shoal.plan.workload import Candidate, Workload, flops_per_token


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

    def to_json(self) -> dict[str, float]:
        """What plan.json keeps of it. The peak is of live tensors; `state_bytes` are exact."""
        return {
            "step_seconds": self.step_seconds,
            "peak_memory_bytes": self.peak.live,
            "state_bytes": self.peak.states,
        }


@dataclass(frozen=True)
class Estimator:
    """Predicts candidates of one workload on one cluster."""

    workload: Workload
    cluster: Cluster
    software: Software = SHOAL
    constants: Constants = DEFAULT

    @cached_property
    def pricing(self) -> Pricing:
        """Times of the parts of a step."""
        return Pricing(self.workload, self.cluster, self.software, self.constants)

    def predict(self, candidate: Candidate) -> Prediction:
        """Seconds and bytes of one step of `candidate`."""
        layout, workload = candidate.layout, self.workload
        micro_batches = candidate.micro_batches(workload)
        works = self.pricing.works(candidate)
        piped = step_seconds(
            candidate.schedule,
            stages=[work.total for work in works],
            micro_batches=micro_batches,
            chunks=candidate.chunks,
        )
        slowest = max(works, key=lambda work: work.total)
        # Parts are those of an average stage; what the slowest adds to them is waiting.
        times = micro_batches / len(works)
        seconds = {
            "compute": times * sum([work.passes.total for work in works]),
            "recompute": times * sum([work.recompute for work in works]),
            "tensor": times * sum([work.tensor for work in works]),
            "context": times * sum([work.context for work in works]),
            "expert": times * sum([work.expert for work in works]),
            "shard": times * sum([work.shard for work in works]),
            "pipeline": times * sum([work.pipeline for work in works]),
            "host": times * sum([work.host for work in works]),
        }
        seconds["bubble"] = max(0.0, piped - sum(seconds.values()))
        shard, replicate = self.pricing.reduction(candidate, backward=slowest.passes.backward)
        seconds["shard"] += shard
        seconds["replicate"] = replicate
        seconds["update"] = self.pricing.update(candidate)
        seconds["host"] += self.software.step_host_seconds
        first, *more = self._memories(candidate)
        return Prediction(
            candidate=candidate,
            seconds=seconds,
            first=first,
            last=more[0] if more else first,
            tokens=workload.tokens,
            workers=layout.workers,
            model_flops=self._step_flops,
            peak_flops_per_second=self._peak,
            device_memory_bytes=self.cluster.smallest_memory_bytes,
        )

    def memory_bytes(self, candidate: Candidate) -> float:
        """Bytes that the device with the highest peak needs; much cheaper than `predict`."""
        return max(memory.total for memory in self._memories(candidate))

    def fits(self, candidate: Candidate, *, headroom: float = 0.0) -> bool:
        """Whether every device has the memory that `candidate` needs, and that share to spare."""
        limit = self.cluster.smallest_memory_bytes * (1 - headroom)
        return all(memory.total <= limit for memory in self._memories(candidate))

    def floor_seconds(self, candidate: Candidate) -> float:
        """A lower bound of the step: the compute of the average stage, nothing else."""
        return self.pricing.floor_seconds(candidate)

    @cached_property
    def _step_flops(self) -> float:
        workload = self.workload
        each = flops_per_token(workload.facts, sequence_tokens=workload.sequence_tokens)
        return each * workload.tokens

    @cached_property
    def _peak(self) -> float:
        peaks = self.cluster.slowest.peak
        return peaks.get(self.workload.precision) or peaks.get("fp16") or peaks["fp32"]

    def _memories(self, candidate: Candidate) -> Iterator[Memory]:
        """Of a device of the first stage, and of the last where that is another."""
        blocks = self.pricing.stages(candidate)
        for index in sorted({0, len(blocks) - 1}):
            yield memory_of(
                Stage(index=index, blocks=blocks[index], count=len(blocks)),
                workload=self.workload,
                candidate=candidate,
                software=self.software,
                constants=self.constants,
            )
