"""Says in words, numbers and a picture why a plan was chosen and the others were not."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from shoal.errors import UserError
from shoal.layout import Layout
from shoal.plan import picture as svg
from shoal.plan.calibrate import crews, fastest_format, learn, rates_of
from shoal.plan.cost.step import Estimator, Prediction
from shoal.plan.hardware import GIB, Cluster
from shoal.plan.measurements import Measurements
from shoal.plan.search import Found, Offer, Space, find, uneven_shares
from shoal.plan.workload import DEGREES, Candidate, Crew
from shoal.units import format_bytes, format_count, format_seconds


def choices(candidate: Candidate) -> str:
    """A candidate in one line, in the words of a recipe."""
    layout = candidate.layout
    who = str(layout)
    if candidate.crew is not None:
        only = layout.replica_workers == 1
        who = str(candidate.crew) if only else f"{candidate.crew} ({layout})"
    parts = [who, f"micro batch {candidate.micro_batch_samples}"]
    if layout.pipeline > 1:
        chunks = f" with {candidate.chunks} stages per rank" if candidate.chunks > 1 else ""
        parts.append(candidate.schedule + chunks)
    if layout.shard > 1:
        parts.append(f"level {candidate.level}")
    if candidate.recompute != "none":
        parts.append(f"{candidate.recompute} recompute")
    if candidate.policy != "every-step":
        parts.append(f"{candidate.policy} every {candidate.every_steps} steps")
    return "; ".join(parts)


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
    if other.candidate.crew is not None:
        reasons["compute"] = "its workers compute less per second"
    reason = reasons.get(part, f"exposed {part} communication")
    return (
        f"+{slower:.0%}: {reason} (+{gains[part] / best.step_seconds:.0%} of the step); "
        f"best was {choices(other.candidate)}"
    )


def far_tensor_note(estimator: Estimator, *, best: Prediction) -> str | None:
    """What a tensor axis that leaves the node would cost, as a sentence; None if it cannot."""
    cluster = estimator.cluster
    degree = 2 * cluster.node_devices
    fixed: dict[str, object] = {"tensor": degree}
    try:
        other = find(estimator, space=Space(fixed=fixed, far_tensor=True)).best
    except UserError:
        return None
    exposed = other.exposed_seconds - best.exposed_seconds
    return (
        f"tensor {degree} crosses nodes: {exposed / best.step_seconds:+.0%} exposed communication, "
        f"{other.step_seconds / best.step_seconds - 1:+.0%} step time"
    )


def period_note(estimator: Estimator, *, best: Prediction) -> str | None:
    """What agreeing every 100 steps would save, when the replicas' exchange costs anything."""
    if best.candidate.layout.replicate == 1 or best.candidate.policy != "every-step":
        return None
    seldom = replace(best.candidate, policy="diloco", every_steps=100)
    other = estimator.predict(seldom)
    gain = 1 - other.step_seconds / best.step_seconds
    if gain < 0.005:
        return None
    room = "" if estimator.fits(seldom) else ", but its outer state does not fit"
    return f"diloco every 100 steps would save {gain:.0%} of the step{room}; it learns differently"


def uneven_note(estimator: Estimator, *, best: Prediction) -> str | None:
    """What shares by speed would save on a mixed cluster."""
    uneven = uneven_shares(estimator, best=best)
    if uneven is None or uneven.seconds > 0.995 * uneven.even_seconds:
        return None
    shares = ", ".join(f"{count} on {name}" for name, count in uneven.shares.items())
    gain = 1 - uneven.seconds / uneven.even_seconds
    return f"shares by speed ({shares} micro batches per replica) would save {gain:.0%} of the step"


def text(found: Found, *, estimator: Estimator) -> str:
    """The whole report for a terminal."""
    best, cluster, workload = found.best, estimator.cluster, estimator.workload
    lines = [
        f"{format_count(workload.facts.parameters)} parameters, "
        f"{workload.global_batch_samples} x {workload.sequence_tokens} tokens per step in "
        f"{workload.precision}, on {cluster}"
        + ("" if cluster.network_is_stated else " (the device's usual adapter)"),
        "",
        f"Plan: {choices(best.candidate)}",
        f"  {format_seconds_fine(best.step_seconds)} per step, "
        f"{format_count(best.tokens_per_second)} tokens/s, {best.mfu:.0%} of peak, "
        f"{format_bytes(best.peak.total)} of {format_bytes(best.device_memory_bytes)}",
        "",
        "Time of a step:",
        *_bars(best.seconds, total=best.step_seconds, unit="s"),
        "",
        f"Memory of the fullest device (stage {'1' if best.peak is best.first else 'last'}):",
        *_bars(
            {name: value / GIB for name, value in best.peak.parts().items()},
            total=best.peak.total / GIB,
            unit="GiB",
        ),
        "",
        f"Runners-up ({found.examined} candidates in {len(found.families)} families):",
    ]
    lines += [
        f"  +{other.step_seconds / best.step_seconds - 1:.1%}  {choices(other.candidate)}"
        for other in found.runners_up
    ]
    lines += ["", "Rejected:"]
    lines += [f"  {name}: {why_not(best, other=other)}" for name, other in found.rejected.items()]
    far = far_tensor_note(estimator, best=best)
    notes = (far, period_note(estimator, best=best), uneven_note(estimator, best=best))
    lines += [f"  {note}" for note in notes if note]
    return "\n".join(lines)


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
    lines = [f"A run over {format_count(tokens)} tokens:"]
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
            f"{price:>12}  {offer.prediction.mfu:4.0%} of peak{gain}"
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
    if chosen is None:
        lines.append("None meets the deadline and the budget: allow more of one of them.")
    return "\n".join(lines)


def to_json(prediction: Prediction) -> dict[str, Any]:
    """A prediction as JSON-able data: times in seconds, memory in bytes."""
    candidate = prediction.candidate
    return {
        "layout": layout_json(candidate.layout),
        "crew": asdict(candidate.crew) if candidate.crew else None,
        "micro_batch_samples": candidate.micro_batch_samples,
        "schedule": candidate.schedule if candidate.layout.pipeline > 1 else None,
        "stages_per_rank": candidate.chunks,
        "recompute": candidate.recompute,
        "level": candidate.level if candidate.layout.shard > 1 else None,
        "policy": candidate.policy,
        "every_steps": candidate.every_steps,
        "codec": candidate.codec,
        "step_seconds": prediction.step_seconds,
        "tokens_per_second": prediction.tokens_per_second,
        "mfu": prediction.mfu,
        "fits": prediction.fits,
        "seconds": {name: value for name, value in prediction.seconds.items() if value},
        "sent_bytes": prediction.sent_bytes,
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


def picture(found: Found) -> str:
    """An SVG of the time and memory breakdown of the plan and its runners-up."""
    plans = [found.best, *found.runners_up]
    height = 60 + 56 * len(plans) + 70
    seen = dict.fromkeys(
        name for plan in plans for name, value in plan.seconds.items() if value > 0.002
    )
    seen |= dict.fromkeys(name for plan in plans for name, v in plan.peak.parts().items() if v)
    parts = [
        svg.words("Time of a step", x=20, y=24, size=15),
        svg.words("Memory of the fullest device", x=520, y=24, size=15),
    ]
    for index, plan in enumerate(plans):
        parts += _row(plan, y=44 + 56 * index, top=found.best)
    for at, name in enumerate(seen):
        x, y = 20 + 105 * (at % 9), height - 48 + 20 * (at // 9)
        parts += [svg.box(name, x=x, y=y, width=11, height=11), svg.words(name, x=x + 15, y=y + 10)]
    return svg.frame(parts, width=980, height=height, font=12)


def _row(plan: Prediction, *, y: float, top: Prediction) -> list[str]:
    text = f"{choices(plan.candidate)} ({plan.step_seconds:.3g} s, {plan.peak.total / GIB:.0f} GiB)"
    limit = f'<line x1="950" x2="950" y1="{y + 14}" y2="{y + 40}" stroke="black"/>'
    return [
        svg.words(text, x=20, y=y + 10),
        *_stack(plan.seconds, x=20, y=y + 16, scale=440 / (1.6 * top.step_seconds)),
        *_stack(plan.peak.parts(), x=520, y=y + 16, scale=430 / plan.device_memory_bytes),
        limit,
    ]


def _stack(parts: dict[str, float], *, x: float, y: float, scale: float) -> list[str]:
    """Boxes beside one another, 440 wide at most."""
    pieces, at = [], 0.0
    for name, value in parts.items():
        width = min(value * scale, 440 - at)
        if width > 0.3:
            pieces.append(svg.box(name, x=x + at, y=y, width=width, height=22))
            at += width
    return pieces


def machine_text(measured: Measurements) -> str:
    """What was measured of a machine, and what its runs have taught, for a terminal."""
    lines = [f"{measured.name}, {measured.cores} cores, {format_bytes(measured.memory_bytes)}"]
    for crew in dict.fromkeys([Crew("processes", 1, 1), *crews(measured)]):
        rates = rates_of(measured, crew)
        peaks = [
            f"{name} {rates.peak(name) * crew.count / 1e9:.3g} GFLOP/s"
            for name in ("fp32", "bf16")
            if rates.precision(name) == name
        ]
        stream = crew.count * 1e8 / rates.stream(1e8) / 1e9
        line = f"  {crew}: {', '.join(peaks)}, memory {stream:.3g} GB/s"
        if crew.count > 1:
            line += (
                f", summing 16 MB {1e3 * rates.reduce(2**24, ranks=crew.count):.3g} ms"
                f", a meeting {1e3 * rates.reduce(32, ranks=crew.count):.2g} ms"
            )
        lines.append(line)
    best, ratio = fastest_format(measured)
    lines.append(f"  fastest format: {best} (bf16 products are {ratio:.2g} x fp32's)")
    lines.append(f"  a worker starts in {1e3 * measured.start_seconds:.0f} ms")
    learned = learn(measured.runs)
    if learned.runs:
        lines.append(
            f"  learned from {learned.runs} run{'s' if learned.runs > 1 else ''}: time x "
            f"{learned.time:.3f}, activations x {learned.activations:.3f}; median error of the "
            f"step {learned.median_error_before:.1%} before, {learned.median_error_after:.1%} after"
        )
    if measured.is_short:
        lines.append("  taken at a first use; shoal plan --calibrate takes more")
    return "\n".join(lines)
