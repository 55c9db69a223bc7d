"""loss.png: the curve of a run, with its evaluations and the loss of a baseline."""

from __future__ import annotations

from pathlib import Path

from shoal.observe.events import read_lines


def plot_run(
    run: Path, *, unit: str = "nats", baseline: float | None = None, baseline_name: str = ""
) -> Path:
    """Draw RUN/metrics.jsonl into RUN/loss.png and return its path.

    `baseline`: a loss that is drawn as a line called `baseline_name`; None: no such line.
    """
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    rows = read_lines(run / "metrics.jsonl")
    steps = [(r["step"], r["loss"]) for r in rows if r.get("loss") is not None]
    checks = [(r["step"], r["evaluation_loss"]) for r in rows if r.get("evaluation_loss")]
    figure = Figure(figsize=(8, 4.5))
    figure.subplots_adjust(left=0.09, right=0.98, top=0.93, bottom=0.11)
    axes = figure.add_subplot()
    if steps:
        axes.plot(*zip(*steps), color="#1f6f8b", linewidth=1.2, label="training loss")
    if checks:
        axes.plot(*zip(*checks), "o-", color="#d1495b", markersize=5, label="validation loss")
    if baseline is not None:
        axes.axhline(baseline, color="#888888", linestyle="--", linewidth=1, label=baseline_name)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"loss ({unit})")
    axes.set_title(run.name)
    axes.grid(alpha=0.25)
    if steps or checks:
        axes.legend(frameon=False)
    path = run / "loss.png"
    figure.savefig(path, dpi=110)
    return path
