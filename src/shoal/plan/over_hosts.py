"""Prices layouts over hosts by their measured links, and chooses one.

The formulas: docs/design/hosts.md. What is counted are bytes on every cable, edge by edge of the
rings and stages as ranks are placed (`layout.host_of_rank`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from shoal.layout import Layout, host_of_rank, workers_of_hosts
from shoal.legal import tensor_degrees
from shoal.plan.cost.work import CODEC_SHARE
from shoal.plan.search import divisors
from shoal.plan.workload import Candidate, Workload, flops_per_token

SUSTAINED = 0.4
"""Of the fastest product that cores were seen to do, what a training keeps up: a guess, which
bears on the idle time of a pipeline and on no exchange."""
_VALUE_BYTES = 4
"""Of what crosses: gradients, hidden states, keys."""
_TENSOR_CALLS = 10
"""Gathers and scatters of a block, both passes (plan/cost/work.py)."""


@dataclass(frozen=True)
class Link:
    """`seconds`: of a message of one byte, one way."""

    bytes_per_second: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """`count` hosts, each as the smallest: its cores, and what one core multiplies and adds."""

    count: int
    cores: int
    flops_per_second: float
    inside: Link
    between: Link

    def threads(self, layout: Layout, *, given: int | None = None) -> int:
        """Cores of each worker: those of the fullest host, divided."""
        return given or max(1, self.cores // self._most(layout))

    def places(self, layout: Layout) -> list[int]:
        """The host of every rank."""
        return [host_of_rank(layout, r, num_hosts=self.count) for r in range(layout.workers)]

    def _most(self, layout: Layout) -> int:
        return max(workers_of_hosts(layout, num_hosts=self.count))

    def worker_flops(self, layout: Layout, *, threads: int) -> float:
        """FLOPs per second of a worker; more threads than cores are no faster."""
        return self.flops_per_second * SUSTAINED * min(threads, self.cores / self._most(layout))


@dataclass(frozen=True, kw_only=True)
class Price:
    """Predicted seconds of a step by part, and of them what the links between hosts take.

    `between_bytes`: through the cable of the host that sends most.
    """

    candidate: Candidate
    seconds: dict[str, float]
    between_seconds: float
    between_bytes: float

    @property
    def step_seconds(self) -> float:
        """Seconds of an optimizer step."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class _Crossing:
    """What an axis sends in a step: `edges` of (from, to, bytes), and messages one after another.

    Each edge is a pair of ranks.
    """

    edges: Iterable[tuple[int, int, float]]
    hops: float


def price(
    candidate: Candidate, *, workload: Workload, hosts: Hosts, threads: int | None = None
) -> Price:
    """What a step of `candidate` takes; experts are not priced.

    `threads`: of each worker, where they are given.
    """
    layout, places = candidate.layout, hosts.places(candidate.layout)
    micro_batches = candidate.micro_batches(workload)
    each = flops_per_token(workload.facts, sequence_tokens=workload.sequence_tokens)
    speed = hosts.worker_flops(layout, threads=hosts.threads(layout, given=threads))
    compute = each * workload.tokens / (layout.workers * speed)
    idle = (layout.pipeline - 1) / micro_batches
    seconds = {"compute": compute, "bubble": compute * idle}
    between_seconds, between_bytes = 0.0, 0.0
    for axis, crossing in _crossings(candidate, workload=workload).items():
        out, inside = Counter[int](), Counter[int]()
        for source, target, num_bytes in crossing.edges:
            far = places[source] != places[target]
            (out if far else inside)[places[source]] += num_bytes  # type: ignore[assignment]
        most, near = max(out.values(), default=0.0), max(inside.values(), default=0.0)
        across = bool(out)
        hop = (hosts.between if across else hosts.inside).seconds
        wire = most / hosts.between.bytes_per_second
        took = max(wire, near / hosts.inside.bytes_per_second) + crossing.hops * hop
        seconds[axis] = took
        between_seconds += took if across else 0.0
        between_bytes += most
    return Price(
        candidate=candidate,
        seconds=seconds,
        between_seconds=between_seconds,
        between_bytes=between_bytes,
    )


def _crossings(candidate: Candidate, *, workload: Workload) -> Mapping[str, _Crossing]:
    layout, facts = candidate.layout, workload.facts
    micro_batches = candidate.micro_batches(workload)
    tokens = candidate.micro_batch_samples * workload.sequence_tokens / layout.context
    hidden = _VALUE_BYTES * tokens * facts.hidden
    held = _VALUE_BYTES * facts.parameters / (layout.tensor * layout.pipeline)
    blocks = micro_batches * facts.layers / layout.pipeline
    found = {}
    if (t := layout.tensor) > 1:
        calls = _TENSOR_CALLS * blocks
        found["tensor"] = _ring(layout, "tensor", each=calls * hidden * (t - 1) / t, hops=calls)
    if (c := layout.context) > 1:
        keys = _VALUE_BYTES * tokens * facts.key_value_heads / t
        keys *= facts.head_size + facts.value_head_size
        # round once forward, and with their gradients once more backward (arXiv 2310.01889)
        found["context"] = _ring(
            layout, "context", each=3 * blocks * keys * (c - 1), hops=3 * blocks
        )
    if layout.pipeline > 1:
        found["pipeline"] = _sends(layout, num_bytes=micro_batches * hidden / t, hops=micro_batches)
    if (s := layout.shard) > 1:
        times = {"parameters": 3 * micro_batches, "gradients": 1 + micro_batches}
        calls = times.get(candidate.level, 2)
        found["shard"] = _ring(layout, "shard", each=calls * held * (s - 1) / s, hops=calls)
    axes = ("replicate",) if layout.context == 1 else ("replicate", "context")
    if (n := layout.replicate * layout.context) > 1:
        each = 2 * (n - 1) / n * held / layout.shard * CODEC_SHARE.get(candidate.codec, 1.0)
        often = 1 if candidate.policy == "every-step" else max(1, candidate.every_steps)
        ring = _ring(layout, *axes, each=each / often, hops=2 / often)
        found["replicate"] = ring
    return found


def _ring(layout: Layout, *axes: str, each: float, hops: float) -> _Crossing:
    """Every rank of a group sends `each` bytes to the next; a call takes size - 1 messages."""
    groups = list(layout.groups(*axes))
    edges = [
        (source, target, each)
        for ranks in groups
        for source, target in zip(ranks, [*ranks[1:], ranks[0]], strict=True)
    ]
    return _Crossing(edges, hops * (len(groups[0]) - 1))


def _sends(layout: Layout, *, num_bytes: float, hops: int) -> _Crossing:
    """Hidden states go to the next stage, their gradients come back."""
    pairs = [pair for ranks in layout.groups("pipeline") for pair in pairwise(ranks)]
    edges = [(a, b, num_bytes) for a, b in pairs] + [(b, a, num_bytes) for a, b in pairs]
    return _Crossing(edges, 2.0 * (hops + layout.pipeline - 1))


def layouts(
    workload: Workload, *, hosts: Hosts, fixed: Mapping[str, int], threads: int | None = None
) -> Iterator[Layout]:
    """Layouts that use all hosts alike, with tensor and context inside each.

    `fixed`: degrees that are given. `threads`: of each worker, where they are given.
    """
    near = {name: fixed.get(name, 1) for name in ("shard", "context", "expert")}
    rest = near["shard"] * near["context"]
    each = [max(1, hosts.cores // threads)] if threads else divisors(hosts.cores)
    for workers in (hosts.count * one for one in each):
        for tensor in tensor_degrees(workload.facts):
            for pipeline in divisors(workers):
                replicate, left = divmod(workers, tensor * pipeline * rest)
                found = {"tensor": tensor, "pipeline": pipeline, "replicate": replicate}
                if left or not replicate or pipeline > workload.facts.layers:
                    continue
                if any(fixed.get(axis, degree) != degree for axis, degree in found.items()):
                    continue
                layout = Layout(**near, **found)
                places = hosts.places(layout)
                inner = layout.groups("tensor", "context")
                if all(len({places[rank] for rank in ranks}) == 1 for ranks in inner):
                    yield layout


def choose(
    candidates: Iterable[Candidate],
    *,
    workload: Workload,
    hosts: Hosts,
    fits: Callable[[Candidate], bool],
    threads: int | None = None,
) -> list[Price]:
    """All that fit, the fastest first; of equals the one with fewest workers."""
    prices = [
        price(each, workload=workload, hosts=hosts, threads=threads)
        for each in candidates
        if fits(each)
    ]
    return sorted(prices, key=lambda each: (each.step_seconds, each.candidate.layout.workers))
