"""Pictures of plans (bars of time and memory) and of a step that was played out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shoal.plan.cost.step import Prediction
from shoal.plan.explain import choices, format_seconds_fine
from shoal.plan.hardware import GIB
from shoal.plan.search import Found
from shoal.plan.simulate import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TIME = {
    "compute": "#3b6ea5",
    "recompute": "#9cc3ea",
    "tensor": "#d1495b",
    "context": "#edae49",
    "expert": "#8d6a9f",
    "shard": "#2a7f62",
    "replicate": "#8fce9f",
    "pipeline": "#c77d3b",
    "bubble": "#c4c4c4",
    "update": "#4a4a4a",
    "host": "#e6cfae",
}
"""A part of a step has one colour in every picture; axes are what they send."""
MEMORY = {
    "weights": "#1f4e79",
    "gradients": "#5b9bd5",
    "optimizer": "#a9cbe8",
    "activations": "#b03a48",
    "logits": "#e08d97",
    "gathers": "#7a5195",
    "transient": "#c7a6d8",
    "reserve": "#d9d9d9",
    "CUDA context": "#8c8c8c",
}
PASSES = {
    "forward": TIME["compute"],
    "backward": "#1d3f66",
    "backward weights": "#7fa8d1",
    "update": TIME["update"],
    "host": TIME["host"],
}


def plans(found: Found) -> Figure:
    """Bars of the predicted time and memory of a plan and those that come next."""
    every = [found.best, *found.runners_up]
    memory = [{k: v / GIB for k, v in plan.peak.parts().items()} for plan in every]
    limit = found.best.device_memory_bytes / GIB
    figure, (upper, lower) = _figure(2, height=1.6 + 0.55 * len(every))
    times = [format_seconds_fine(plan.step_seconds) for plan in every]
    _bars(upper, every, [plan.seconds for plan in every], times, colours=TIME)
    upper.set(title="Predicted time of a step", xlabel="s")
    totals = [f"{plan.peak.total / GIB:.3g} GiB" for plan in every]
    _bars(lower, every, memory, totals, colours=MEMORY, limit=limit)
    lower.axvline(limit, color="#222222", linewidth=1)
    lower.text(limit, -0.75, f"a device has {limit:.3g} GiB ", ha="right", va="center")
    lower.set(title="Predicted memory of the fullest device", xlabel="GiB")
    return figure


def _figure(rows: int, *, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(10, rows * height), layout="constrained")
    axes = figure.subplots(rows)
    for each in axes if rows > 1 else [axes]:
        each.spines[["top", "left", "right"]].set_visible(False)
        each.yaxis.set_ticks_position("none")
    return figure, axes


def _bars(
    axes: Axes,
    every: Sequence[Prediction],
    rows: Sequence[Mapping[str, float]],
    numbers: Sequence[str],
    *,
    colours: Mapping[str, str],
    limit: float = 0.0,
) -> None:
    """A stacked bar for each plan, its name above it and its number behind it; and a legend."""
    most = max(limit, *(sum(parts.values()) for parts in rows))
    seen = [name for name in colours if any(p.get(name, 0) > 0.002 * most for p in rows)]
    ends = [0.0] * len(rows)
    for name in seen:
        widths = [parts.get(name, 0.0) for parts in rows]
        axes.barh(range(len(rows)), widths, 0.4, left=ends, color=colours[name], label=name)
        ends = [end + width for end, width in zip(ends, widths)]
    for at, (plan, parts, number) in enumerate(zip(every, rows, numbers, strict=True)):
        axes.text(0, at - 0.26, choices(plan.candidate), va="bottom", fontsize=8)
        axes.text(sum(parts.values()), at, f" {number}", va="center")
    axes.set(xlim=(0, 1.12 * most), ylim=(len(rows) - 0.6, -1.0), yticks=[])
    _legend(axes, {name: colours[name] for name in seen})


def _legend(axes: Axes, colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=name) for name, colour in colours.items()]
    axes.legend(
        handles=patches, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8
    )


def step(timeline: Timeline) -> Figure:
    """The lanes of each stage, passes above and exposed communication below, over time."""
    figure, axes = _figure(1, height=1.4 + 0.35 * timeline.stages)
    kinds = [(_kind(span.name), span.lane.removeprefix("link ")) for span in timeline.spans]
    most = max(span.stop for span in timeline.spans)
    axes.hlines(range(timeline.stages), 0, most, color=TIME["bubble"], linewidth=1, zorder=0)
    bars: dict[tuple[int, str, bool], list[tuple[float, float]]] = {}
    for span, (kind, axis) in zip(timeline.spans, kinds, strict=True):
        own = span.lane == "compute"
        key = (span.stage, PASSES[kind] if own else TIME[axis], own)
        bars.setdefault(key, []).append((span.start, span.stop - span.start))
    for (stage, colour, own), widths in bars.items():
        axes.broken_barh(widths, (stage - 0.3, 0.4) if own else (stage + 0.15, 0.2), color=colour)
    axes.set(
        yticks=range(timeline.stages),
        yticklabels=[f"stage {stage + 1}" for stage in range(timeline.stages)],
        ylim=(timeline.stages - 0.5, -0.6),
        xlim=(0, most),
        xlabel="s",
        title=_headline(timeline),
    )
    lanes = {lane for _, lane in kinds} - {"compute"}
    links = {f"{axis} communication": TIME[axis] for axis in TIME if axis in lanes}
    _legend(axes, {**{name: PASSES[name] for name in _of(PASSES, kinds)}, **links})
    return figure


def _headline(timeline: Timeline) -> str:
    shown = ""
    if timeline.shown_micro_batches < timeline.micro_batches:
        shown = f"; first {timeline.shown_micro_batches} of {timeline.micro_batches} micro batches"
    return (
        f"One step, played out: {format_seconds_fine(timeline.seconds)} predicted, "
        f"{timeline.bubble:.1%} of the passes idle{shown}"
    )


def _of(colours: Iterable[str], kinds: Sequence[tuple[str, str]]) -> list[str]:
    return [name for name in colours if any(kind == name for kind, _ in kinds)]


def _kind(name: str) -> str:
    return name.rstrip("0123456789").rstrip()
