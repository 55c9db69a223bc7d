"""Simulates one step on a cluster: a timeline per stage and link, as a trace."""

from __future__ import annotations

import json
from dataclasses import dataclass

from shoal.plan.cost.step import Estimator
from shoal.plan.schedules import Piece, Times, idle_fraction, play, rank_of_stage
from shoal.plan.workload import Candidate

_WORDS = {"F": "forward", "B": "backward", "W": "backward weights"}
_MOST_PIECES = 60_000


@dataclass(frozen=True, slots=True)
class Span:
    """Something that occupies a lane of a stage from `start` to `stop`, in seconds."""

    lane: str
    stage: int
    name: str
    start: float
    stop: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """One step. Each lane stands for the `copies` devices that do the same at the same time.

    `seconds` is the length of the whole step; when `shown_micro_batches` is less than
    `micro_batches`, only those were played out and the rest was added at the steady rate.
    `bubble` is the idle share of the passes.
    """

    spans: list[Span]
    stages: int
    copies: int
    seconds: float
    bubble: float
    micro_batches: int
    shown_micro_batches: int


def simulate_step(estimator: Estimator, *, candidate: Candidate) -> Timeline:
    """Play out one step of `candidate`: passes, links, bubbles, reduce, update."""
    pricing, layout = estimator.pricing, candidate.layout
    works = pricing.works(candidate)
    ranks, micro_batches = layout.pipeline, candidate.micro_batches(estimator.workload)
    shown = _shown(candidate, micro_batches=micro_batches)
    stages = [
        _times(
            works[rank_of_stage(candidate.schedule, stage=at, ranks=ranks)].total,
            candidate=candidate,
        )
        for at in range(ranks * candidate.chunks)
    ]
    pieces = play(candidate.schedule, stages=stages, ranks=ranks, micro_batches=shown)
    spans = [
        Span("compute", p.rank, f"{_WORDS[p.kind]} {p.micro_batch}", p.start, p.stop)
        for p in pieces
    ]
    for piece in pieces:
        work = works[piece.rank]
        spans += _links(
            piece,
            work={
                "tensor": work.tensor,
                "context": work.context,
                "expert": work.expert,
                "shard": work.shard,
                "pipeline": work.pipeline,
            },
            total=work.total,
        )
    at = max(piece.stop for piece in pieces)
    slowest = max(works, key=lambda work: work.total)
    shard, replicate = pricing.reduction(candidate, backward=slowest.passes.backward)
    tail = [("shard", "reduce", shard), ("replicate", "reduce", replicate)]
    tail += [("compute", "update", pricing.update(candidate))]
    tail += [("compute", "host", estimator.software.step_host_seconds)]
    for lane, name, seconds in tail:
        if seconds > 0:
            spans += [Span(lane, rank, name, at, at + seconds) for rank in range(ranks)]
            at += seconds
    return Timeline(
        spans=spans,
        stages=ranks,
        copies=layout.workers // ranks,
        seconds=at + (micro_batches - shown) * slowest.total,
        bubble=idle_fraction(pieces, ranks=ranks),
        micro_batches=micro_batches,
        shown_micro_batches=shown,
    )


def _shown(candidate: Candidate, *, micro_batches: int) -> int:
    """Micro batches to play out: enough to fill the pipeline, few enough to answer at once."""
    ranks = candidate.layout.pipeline
    most = max(2 * ranks, _MOST_PIECES // (3 * ranks * candidate.chunks))
    if micro_batches <= most:
        return micro_batches
    return most - most % ranks


def _times(total: float, *, candidate: Candidate) -> Times:
    """Seconds of one chunk; a stage's exposed communication is spread over its passes.

    Backward takes twice as long as forward; schedules that split it halve that.
    """
    each = total / candidate.chunks / 3
    return Times(forward=each, backward_input=each, backward_weight=each)


def _links(piece: Piece, *, work: dict[str, float], total: float) -> list[Span]:
    """What of a piece is exposed communication, laid at its end, one lane per axis."""
    spans, stop = [], piece.stop
    length = piece.stop - piece.start
    for axis, seconds in work.items():
        if seconds > 0:
            start = stop - length * seconds / total
            name = "send" if axis == "pipeline" else "communication"
            spans.append(Span(f"link {axis}", piece.rank, name, start, stop))
            stop = start
    return spans


def trace(timeline: Timeline) -> str:
    """The timeline in the Trace Event format that Perfetto and chrome://tracing open."""
    lanes = sorted({span.lane for span in timeline.spans})
    events: list[dict[str, object]] = []
    for stage in range(timeline.stages):
        name = f"stage {stage} ({timeline.copies} devices)"
        events.append({"name": "process_name", "ph": "M", "pid": stage, "args": {"name": name}})
        events += [
            {"name": "thread_name", "ph": "M", "pid": stage, "tid": at, "args": {"name": lane}}
            for at, lane in enumerate(lanes)
        ]
    events += [
        {
            "name": span.name,
            "ph": "X",
            "pid": span.stage,
            "tid": lanes.index(span.lane),
            "ts": round(span.start * 1e6, 3),
            "dur": round((span.stop - span.start) * 1e6, 3),
        }
        for span in timeline.spans
    ]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
