"""compare.png: loss against tokens, time and bytes, a line for each choice."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from shoal.prove.comparison import Comparison
from shoal.units import format_count

_AXES = ("target tokens", "seconds of steps", "bytes sent by worker 0")


def draw(found: Comparison, path: Path) -> None:
    """Evaluation loss; the mean over seeds as a line, each seed as a thin one."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for number, name in enumerate(found.choices):
        runs, colour = found.of(name), f"C{number % 10}"
        for axes, column in zip(panels, (0, 1, 3), strict=True):
            for run in runs if len(runs) > 1 else []:
                points = [(row[column], row[2]) for row in run.curve[1:]]
                axes.plot(*zip(*points, strict=True), color=colour, alpha=0.25, linewidth=0.8)
            points = [
                (mean(row[column] for row in rows), mean(row[2] for row in rows))
                for rows in zip(*(run.curve[1:] for run in runs), strict=True)
            ]
            label = name if len(name) < 60 else name[:57] + "..."
            axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, label=label)
    for axes, words in zip(panels, _AXES, strict=True):
        axes.set_xlabel(words)
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_formatter(lambda count, _: format_count(count))
    panels[2].set_xscale("symlog", linthresh=1e4)
    panels[0].set_ylabel("evaluation loss")
    panels[0].legend(frameon=False, fontsize=8)
    if found.link:
        figure.suptitle(f"each link between replicas: {found.link}", fontsize=10)
    figure.savefig(path, dpi=110)
