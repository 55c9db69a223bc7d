"""Says in words and numbers why a plan was chosen and the others were not."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from shoal.errors import UserError
from shoal.layout import Layout
from shoal.legal import Combination, not_yet
from shoal.plan.cost.step import Estimator, Prediction
from shoal.plan.hardware import GIB, Cluster
from shoal.plan.search import Found, Offer, Space, find
from shoal.plan.workload import DEGREES, Candidate
from shoal.units import format_bytes, format_count, format_seconds

ZERO = {"optimizer": "ZeRO-1", "gradients": "ZeRO-2", "parameters": "ZeRO-3"}
"""What the field calls the levels of the shard axis (arXiv 1910.02054)."""

ERROR = "half of 1,206 published runs lie within 13 % of what is predicted; none is a run of shoal"
"""Of a predicted time: docs/guide/planner.md, sources that the model was not fitted to."""

_WORTH = 1.5
"""More devices are worth naming from this gain over one of them."""


def choices(candidate: Candidate) -> str:
    """A candidate in one line, in the words of a recipe."""
    layout = candidate.layout
    parts = [str(layout), f"micro batch {candidate.micro_batch_samples}"]
    if layout.pipeline > 1:
        chunks = f" with {candidate.chunks} stages per rank" if candidate.chunks > 1 else ""
        parts.append(candidate.schedule + chunks)
    if layout.shard > 1:
        parts.append(f"{ZERO[candidate.level]} (shard.level {candidate.level})")
    if candidate.recompute != "none":
        parts.append(f"{candidate.recompute} recompute")
    if candidate.policy != "every-step":
        parts.append(f"{candidate.policy} every {candidate.every_steps} steps")
    return "; ".join(parts)


def command(candidate: Candidate, *, recipe: str, overrides: Iterable[str] = ()) -> str:
    """The command line that runs a candidate."""
    layout = candidate.layout
    words = [f"parallel.replicate={layout.replicate}"]
    for axis in DEGREES:
        degree = layout.degree(axis)
        if axis == "shard" and degree > 1 and candidate.level != "parameters":
            words.append(f"parallel.shard={{degree: {degree}, level: {candidate.level}}}")
        elif axis == "pipeline" and degree > 1 and candidate.schedule != "1f1b":
            each = f", stages_per_rank: {candidate.chunks}" if candidate.chunks > 2 else ""
            how = f"degree: {degree}, schedule: {candidate.schedule}{each}"
            words.append(f"parallel.pipeline={{{how}}}")
        elif axis != "replicate" and degree > 1:
            words.append(f"parallel.{axis}={degree}")
    if candidate.recompute != "none":
        words.append(f"parallel.recompute={candidate.recompute}")
    if candidate.policy != "every-step":
        period = f", every_steps: {candidate.every_steps}"
        words.append(f"sync={{kind: {candidate.policy}{period}}}")
    if candidate.codec != "none":
        words.append(f"sync.codec.kind={candidate.codec}")
    words.append(f"train.micro_batch_samples={candidate.micro_batch_samples}")
    named = {word.partition("=")[0] for word in words}
    kept = [word for word in overrides if word.partition("=")[0] not in named]
    return shlex.join(["shoal", "train", recipe, *kept, *words])


def why_not(best: Prediction, *, other: Prediction) -> str:
    """One sentence on the largest thing that makes `other` slower than `best`."""
    slower = other.step_seconds / best.step_seconds - 1
    gains = {
        part: other.seconds.get(part, 0.0) - best.seconds.get(part, 0.0) for part in other.seconds
    }
    part = max(gains, key=lambda name: gains[name])
    reasons = {
        "compute": "smaller pieces per device compute less efficiently",
        "recompute": "memory forces recompute",
        "bubble": f"{other.candidate.layout.pipeline} stages wait for one another",
        "update": "each device updates more parameters",
        "host": "the devices wait for the host to start kernels",
    }
    reason = reasons.get(part, f"exposed {part} communication")
    return (
        f"+{slower:.0%}: {reason} (+{gains[part] / best.step_seconds:.0%} of the step); "
        f"best was {choices(other.candidate)}"
    )


def alone_note(estimator: Estimator, *, best: Prediction, space: Space) -> str | None:
    """Whether one device would do, as a sentence; None where the model does not fit on one."""
    cluster = estimator.cluster
    if cluster.workers == 1:
        return None
    one = replace(cluster, groups=(replace(cluster.groups[0], count=1, devices=1),))
    degrees = dict.fromkeys(DEGREES, 1)
    try:
        alone = find(
            replace(estimator, cluster=one),
            space=replace(space, fixed={**space.fixed, **degrees}),
        ).best
    except UserError:
        return None
    gain = alone.step_seconds / best.step_seconds
    enough = "One device is enough: it" if gain < _WORTH else "One device alone"
    return (
        f"{enough} takes {format_seconds_fine(alone.step_seconds)} a step (predicted); "
        f"{cluster.workers} devices are {gain:.2g} x as fast"
    )


def text(
    found: Found,
    *,
    estimator: Estimator,
    anywhere: Found | None = None,
    missing: Sequence[str] = (),
    today: Sequence[str] = (),
) -> str:
    """The whole report for a terminal.

    `anywhere`: the best plans with what shoal cannot run yet; `missing`: what the plan needs and
    it lacks; `today`: lines that say what runs, and how.
    """
    best, cluster, workload = found.best, estimator.cluster, estimator.workload
    lines = [
        f"{format_count(workload.facts.parameters)} parameters, "
        f"{workload.global_batch_samples} x {workload.sequence_tokens} tokens per step in "
        f"{workload.precision}, on {cluster}"
        + ("" if cluster.network_is_stated else " (the device's usual adapter)"),
        "",
        *[f"Not in shoal yet: {line}" for line in missing],
        f"{'It would be' if missing else 'Plan'}: {choices(best.candidate)}",
        f"  predicted {format_seconds_fine(best.step_seconds)} a step, "
        f"{format_count(best.tokens_per_second)} tokens/s, MFU {_percent(best.mfu)}, "
        f"{format_bytes(best.peak.total)} of {format_bytes(best.device_memory_bytes)}",
        f"  ({ERROR})",
        *today,
        "",
        "Predicted time of a step:",
        *_bars(best.seconds, total=best.step_seconds, unit="s"),
        "",
        f"Predicted memory of the fullest device "
        f"(stage {'1' if best.peak is best.first else 'last'}):",
        *_bars(
            {name: value / GIB for name, value in best.peak.parts().items()},
            total=best.peak.total / GIB,
            unit="GiB",
        ),
        "",
        f"Next best ({found.examined} candidates in {len(found.families)} families; step time):",
    ]
    lines += [
        f"  +{other.step_seconds / best.step_seconds - 1:.1%}  {choices(other.candidate)}"
        for other in found.runners_up
    ]
    lines += ["", "Other families:"]
    lines += [f"  {name}: {why_not(best, other=other)}" for name, other in found.rejected.items()]
    if anywhere is not None and anywhere.best.step_seconds < 0.995 * best.step_seconds:
        gain = anywhere.best.step_seconds / best.step_seconds - 1
        what = f"{choices(anywhere.best.candidate)}: {gain:+.0%} step time (predicted)"
        lines += ["", f"Not in shoal yet, would be: {what}"]
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def format_seconds_fine(seconds: float) -> str:
    """Seconds with three digits below a minute, else as usual."""
    return f"{seconds:.3g} s" if seconds < 60 else format_seconds(seconds)


def _bars(parts: dict[str, float], *, total: float, unit: str) -> list[str]:
    shown = [(name, value) for name, value in parts.items() if value > 0.002 * total]
    return [
        f"  {name:12} {value:9.3g} {unit}  {value / total:5.1%}  "
        f"{'#' * max(1, round(40 * value / total))}"
        for name, value in sorted(shown, key=lambda item: -item[1])
    ]


def offers_text(offers: list[Offer], *, chosen: Offer | None, tokens: int) -> str:
    """The table of device counts for a whole run, and when more no longer pay."""
    lines = [f"A run over {format_count(tokens)} tokens (predicted):"]
    before: Offer | None = None
    last_paying: Offer | None = None
    for offer in offers:
        price = f"${offer.price:,.0f}" if offer.price else "price unknown"
        gain = ""
        if before is not None:
            worth = (before.seconds / offer.seconds) / (
                offer.cluster.workers / before.cluster.workers
            )
            gain = f"  {worth:.0%} of the added devices pay"
            if worth >= 0.5:
                last_paying = offer
        mark = "->" if offer is chosen else "  "
        lines.append(
            f" {mark} {offer.cluster.workers:6d} devices  {format_seconds(offer.seconds):>10}  "
            f"{price:>12}  MFU {_percent(offer.prediction.mfu):>7}{gain}"
        )
        before = offer
    if last_paying is not None:
        lines.append(
            f"Beyond {last_paying.cluster.workers} devices "
            + (
                "is not known here: the cluster ends."
                if last_paying is offers[-1]
                else "less than half of the added ones pay."
            )
        )
    one = offers[0]
    if chosen not in (None, one) and one.cluster.workers == 1:
        times = one.seconds / chosen.seconds
        if times < _WORTH:
            lines.append(f"One device is enough: the plan is {times:.2g} x as fast as it")
    if chosen is None:
        lines.append("None meets the deadline and the budget: allow more of one of them.")
    return "\n".join(lines)


def to_json(prediction: Prediction) -> dict[str, Any]:
    """A prediction as JSON-able data: times in seconds, memory in bytes."""
    candidate = prediction.candidate
    problems = not_yet(
        Combination(layout=candidate.layout, policy=candidate.policy, codec=candidate.codec)
    )
    return {
        "layout": layout_json(candidate.layout),
        "micro_batch_samples": candidate.micro_batch_samples,
        "schedule": candidate.schedule if candidate.layout.pipeline > 1 else None,
        "stages_per_rank": candidate.chunks,
        "recompute": candidate.recompute,
        "level": candidate.level if candidate.layout.shard > 1 else None,
        "policy": candidate.policy,
        "every_steps": candidate.every_steps,
        "codec": candidate.codec,
        "not_yet": [f"{problem.what}; {problem.hint}" for problem in problems],
        "step_seconds": prediction.step_seconds,
        "tokens_per_second": prediction.tokens_per_second,
        "mfu": prediction.mfu,
        "fits": prediction.fits,
        "seconds": {name: value for name, value in prediction.seconds.items() if value},
        "peak_memory_bytes": prediction.peak.total,
        "live_memory_bytes": prediction.peak.live,
        "memory": {
            "first_stage": prediction.first.parts(),
            "last_stage": prediction.last.parts(),
        },
    }


def layout_json(layout: Layout) -> dict[str, int]:
    """The degrees of a layout by axis name."""
    return {axis: layout.degree(axis) for axis in DEGREES}


def report_json(found: Found, *, cluster: Cluster) -> dict[str, Any]:
    """The whole report as JSON-able data."""
    return {
        "cluster": str(cluster),
        "workers": cluster.workers,
        "plan": to_json(found.best),
        "runners_up": [to_json(other) for other in found.runners_up],
        "rejected": {
            name: {**to_json(other), "reason": why_not(found.best, other=other)}
            for name, other in found.rejected.items()
        },
        "examined": found.examined,
    }
