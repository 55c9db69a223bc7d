"""loss.png: the curve of a run, its evaluations, saves and recoveries, and a baseline's loss."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.observe.events import read_lines
from shoal.units import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRAINING, _EVALUATION, _QUIET = "#1f6f8b", "#d17a00", "#777777"
_MARKS = {
    "saved": (("saved",), "^k"),
    "recovered or resumed": (("recovered", "restarted", "resumed", "repaired"), "Xr"),
}
"""Label -> events, marker and colour; drawn at the foot of the picture."""


def plot_run(
    run: Path,
    *,
    unit: str = "nats",
    baseline: float | None = None,
    baseline_name: str = "",
    is_scored: bool = True,
) -> Path:
    """Draw RUN/metrics.jsonl and events.jsonl into RUN/loss.png and return its path.

    `baseline`: a loss that is drawn as a thin line called `baseline_name`; it does not set the
    scale: where it lies outside, words say so. None: no such line. `is_scored`: evaluations
    have the same loss.
    """
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    rows = read_lines(run / "metrics.jsonl")
    steps = [row for row in rows if row.get("loss") is not None]
    checks = [row for row in rows if is_scored and row.get("evaluation_loss") is not None]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if steps:
        at, losses = [row["step"] for row in steps], [row["loss"] for row in steps]
        axes.plot(at, losses, _TRAINING, alpha=0.3, linewidth=0.8)
        axes.plot(at, smoothed(losses), _TRAINING, linewidth=1.6, label="training, smoothed")
        _tokens_axis(axes, last=steps[-1])
    if checks:
        at, losses = [row["step"] for row in checks], [row["evaluation_loss"] for row in checks]
        axes.plot(
            at, losses, "o-", color=_EVALUATION, markersize=5, linewidth=1, label="validation"
        )
    _mark(axes, read_lines(run / "events.jsonl"))
    if baseline is not None and (steps or checks):
        _baseline(axes, baseline, name=baseline_name)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"loss ({unit})")
    axes.set_title(run.name, loc="left", fontsize=10)
    axes.grid(alpha=0.25)
    if steps or checks:
        axes.legend(frameon=False, fontsize=9)
    path = run / "loss.png"
    figure.savefig(path, dpi=110)
    return path


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours, about 3 % of the curve; fewer near its ends."""
    half = round(0.015 * len(values))
    sums = [0.0, *itertools.accumulate(values)]
    found = []
    for at in range(len(values)):
        near = min(half, at, len(values) - 1 - at)
        found.append((sums[at + near + 1] - sums[at - near]) / (2 * near + 1))
    return found


def _tokens_axis(axes: Axes, *, last: dict[str, Any]) -> None:
    """Above, the targets trained on so far (a step has about as many as any other)."""
    each = last.get("tokens", 0) / max(1, last["step"])
    if each:
        above = axes.secondary_xaxis("top", functions=(lambda n: n * each, lambda n: n / each))
        above.xaxis.set_major_formatter(lambda count, _: format_count(count))
        above.set_xlabel("target tokens", fontsize=9)
        above.tick_params(labelsize=8)


def _mark(axes: Axes, events: Sequence[dict[str, Any]]) -> None:
    foot = axes.get_xaxis_transform()  # steps across, the height of the picture upwards
    for label, (names, style) in _MARKS.items():
        at = [row["step"] for row in events if row["event"] in names and "step" in row]
        if at:
            axes.plot(at, [0.025] * len(at), style, markersize=5, transform=foot, label=label)


def _baseline(axes: Axes, loss: float, *, name: str) -> None:
    low, high = axes.get_ylim()
    axes.axhline(loss, color=_QUIET, linestyle=":", linewidth=1)
    axes.set_ylim(low, high)
    where = " (above)" if loss > high else " (below)" if loss < low else ""
    share = min(max((loss - low) / (high - low) + 0.012, 0.07), 0.94)
    across = 0.3 if loss > high else 0.01  # of the width: beside the curve, which begins high
    at = axes.transAxes
    axes.text(across, share, f"{name} {loss:.3g}{where}", color=_QUIET, fontsize=8, transform=at)
