"""SVG pictures of plans (bars of time and memory) and of a step that was played out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from math import floor, log10

from shoal.plan.cost.step import Prediction
from shoal.plan.explain import choices, format_seconds_fine
from shoal.plan.hardware import GIB
from shoal.plan.search import Found
from shoal.plan.simulate import Timeline

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
_LEFT, _WIDTH = 24, 900
_STEPS = (1, 2, 5, 10)


def plans(found: Found) -> str:
    """Bars of the predicted time and memory of a plan and those that come next."""
    every = [found.best, *found.runners_up]
    times = [(p.seconds, p.step_seconds, format_seconds_fine(p.step_seconds)) for p in every]
    memory = [
        ({name: value / GIB for name, value in p.peak.parts().items()}, p.peak.total / GIB)
        for p in every
    ]
    limit = found.best.device_memory_bytes / GIB
    upper, height = _bars(every, times, title="Predicted time of a step", unit="s", colours=TIME)
    rows = [(parts, total, f"{total:.3g} GiB") for parts, total in memory]
    lower, height = _bars(
        every,
        rows,
        title="Predicted memory of the fullest device",
        unit="GiB",
        colours=MEMORY,
        limit=limit,
        y=height + 24,
    )
    return _frame([*upper, *lower], height=height)


def _bars(
    every: list[Prediction],
    rows: list[tuple[dict[str, float], float, str]],
    *,
    title: str,
    unit: str,
    colours: Mapping[str, str],
    limit: float = 0.0,
    y: float = 0.0,
) -> tuple[list[str], float]:
    """A title, a legend, a named bar with its number for each plan, an axis; and the lower end."""
    most = max(limit, *(total for _, total, _ in rows))
    scale, small = (_WIDTH - 90) / most, 0.002 * most
    seen = [name for name in colours if any(parts.get(name, 0) > small for parts, _, _ in rows)]
    parts = [_words(title, x=_LEFT, y=y + 24, size=16), *_legend(seen, colours=colours, y=y + 36)]
    top = y = y + 60
    for plan, (values, total, number) in zip(every, rows, strict=True):
        parts.append(_words(choices(plan.candidate), x=_LEFT, y=y + 12))
        at = float(_LEFT)
        for name in seen:
            width = values.get(name, 0.0) * scale
            label = f"{name}: {values.get(name, 0.0):.3g} {unit}"
            parts.append(_box(colours[name], x=at, y=y + 17, width=width, height=16, title=label))
            at += width
        parts.append(_words(number, x=_LEFT + total * scale + 6, y=y + 30))
        y += 40
    if limit:
        x = _LEFT + limit * scale
        parts.append(_line(x, top, x, y))
        parts.append(_words(f"a device has {limit:.3g} GiB", x=x + 4, y=top - 6, end=True))
    return [*parts, *_axis(most=most, scale=scale, x=_LEFT, y=y + 4, unit=unit)], y + 36


def step(timeline: Timeline) -> str:
    """The lanes of each stage, passes above and exposed communication below, over time."""
    left, row, top = 84, 34, 86
    most = max(span.stop for span in timeline.spans)
    scale = (_WIDTH + _LEFT - left - 20) / most
    kinds = [(_kind(span.name), span.lane.removeprefix("link ")) for span in timeline.spans]
    passes = [name for name in PASSES if any(kind == name for kind, _ in kinds)]
    links = [axis for axis in TIME if any(lane == axis for _, lane in kinds)]
    shown = ""
    if timeline.shown_micro_batches < timeline.micro_batches:
        shown = f"; first {timeline.shown_micro_batches} of {timeline.micro_batches} micro batches"
    title = (
        f"One step, played out: {format_seconds_fine(timeline.seconds)} predicted, "
        f"{timeline.bubble:.1%} of the passes idle{shown}"
    )
    legend = {**PASSES, **{f"{axis} communication": TIME[axis] for axis in links}}
    names = [*passes, *(f"{axis} communication" for axis in links)]
    parts = [_words(title, x=_LEFT, y=24, size=16), *_legend(names, colours=legend, y=36)]
    for stage in range(timeline.stages):
        y = top + row * stage
        parts.append(_words(f"stage {stage + 1}", x=_LEFT, y=y + 14))
        parts.append(_box(TIME["bubble"], x=left, y=y + 9, width=most * scale, height=2))
    for span, (kind, axis) in zip(timeline.spans, kinds, strict=True):
        own = span.lane == "compute"
        parts.append(
            _box(
                PASSES[kind] if own else TIME[axis],
                x=left + span.start * scale,
                y=top + row * span.stage + (0 if own else 20),
                width=max((span.stop - span.start) * scale, 0.2),
                height=18 if own else 7,
                title=span.name if own else f"{axis}: {span.name}",
            )
        )
    bottom = top + row * timeline.stages
    return _frame(
        [*parts, *_axis(most=most, scale=scale, x=left, y=bottom, unit="s")], height=bottom + 36
    )


def _kind(name: str) -> str:
    return name.rstrip("0123456789").rstrip()


def _axis(*, most: float, scale: float, x: float, y: float, unit: str) -> list[str]:
    """A line with four to ten ticks and their numbers; the last carries the unit."""
    rough = most / 6
    base = 10.0 ** floor(log10(rough))
    tick = next(base * factor for factor in _STEPS if base * factor >= rough)
    parts = [_line(x, y, x + most * scale, y)]
    count = int(most / tick)
    for number in range(count + 1):
        at = x + number * tick * scale
        parts.append(_line(at, y, at, y + 4))
        label = f"{number * tick:.4g}" + (f" {unit}" if number == count else "")
        parts.append(_words(label, x=at - 4, y=y + 17))
    return parts


def _legend(names: Iterable[str], *, colours: Mapping[str, str], y: float) -> list[str]:
    parts, x = [], float(_LEFT)
    for name in names:
        if x + 30 + 7 * len(name) > _LEFT + _WIDTH:
            x, y = float(_LEFT), y + 15
        parts.append(_box(colours[name], x=x, y=y, width=11, height=11))
        parts.append(_words(name, x=x + 15, y=y + 10))
        x += 30 + 7 * len(name)
    return parts


def _frame(parts: Iterable[str], *, height: float) -> str:
    """A whole SVG of `parts` on white."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH + 2 * _LEFT}" '
            f'height="{height:.0f}" font-family="sans-serif" font-size="12" fill="#222222">',
            '<rect width="100%" height="100%" fill="white"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def _words(text: str, *, x: float, y: float, size: int = 12, end: bool = False) -> str:
    """Text with its left (or right) end at `x`."""
    how = ' text-anchor="end"' if end else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}"{how}>{escape(text)}</text>'


def _line(x: float, y: float, to_x: float, to_y: float) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="#222222"/>'


def _box(colour: str, *, x: float, y: float, width: float, height: float, title: str = "") -> str:
    """A filled box; a title shows under the mouse."""
    return (
        f'<rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height}" '
        f'fill="{colour}"><title>{escape(title)}</title></rect>'
    )
