"""loss.png says what a run says: the numbers that are drawn, and what must not set the scale."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.figure
import pytest

from shoal.launch.plot import plot_run, smoothed
from tiny import Bench


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """Figures as they were when they were saved."""
    found: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure: matplotlib.figure.Figure, *words: object, **more: object) -> None:
        found.append(figure)
        save(figure, *words, **more)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return found


def texts(figure: matplotlib.figure.Figure) -> list[str]:
    return [each.get_text() for each in figure.axes[0].texts]


def test_the_curve_of_a_run(bench: Bench, drawn: list[matplotlib.figure.Figure]) -> None:
    run = bench.run()
    path = plot_run(run.path, unit="nats per token", baseline=50.0, baseline_name="unigram")
    assert path.name == "loss.png" and path.read_bytes().startswith(b"\x89PNG")
    axes = drawn[-1].axes[0]
    raw, smooth, checks, saves, _ = axes.lines
    assert list(raw.get_ydata()) == run.losses
    assert list(smooth.get_ydata()) == pytest.approx(smoothed(run.losses))
    assert list(checks.get_xdata()) == [row["step"] for row in run.evaluations] == [0, 15, 30]
    assert list(saves.get_xdata()) == [10, 15, 20, 30], "every 10, and at a best evaluation"
    assert axes.get_yscale() == "linear" and axes.get_ylim()[1] < 8, "the baseline sets no scale"
    assert texts(drawn[-1]) == ["unigram 50 (above)"]


def test_a_baseline_inside_is_a_line(bench: Bench, drawn: list[matplotlib.figure.Figure]) -> None:
    losses = bench.run().losses
    middle = (losses[0] + losses[-1]) / 2
    plot_run(bench.run().path, baseline=middle, baseline_name="unigram")
    assert list(drawn[-1].axes[0].lines[-1].get_ydata()) == [middle, middle]
    assert texts(drawn[-1]) == [f"unigram {middle:.3g}"]


def test_recoveries_are_marked(tmp_path: Path, drawn: list[matplotlib.figure.Figure]) -> None:
    rows = [{"step": step, "loss": 3.0 - 0.1 * step, "tokens": 500 * step} for step in range(1, 9)]
    events = [{"event": "recovered", "step": 5}, {"event": "saved", "step": 4}, {"event": "lost"}]
    for name, lines in (("metrics", rows), ("events", events)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    plot_run(tmp_path)
    labels = {line.get_label(): list(line.get_xdata()) for line in drawn[-1].axes[0].lines}
    assert labels["saved"] == [4] and labels["recovered or resumed"] == [5]
    (tokens,) = drawn[-1].axes[0].child_axes
    ticks = dict(zip(tokens.get_xticks(), (t.get_text() for t in tokens.get_xticklabels())))
    assert ticks[2000.0] == "2k"


def test_a_run_without_rows_gets_an_empty_picture(tmp_path: Path) -> None:
    assert plot_run(tmp_path).is_file()
    assert plot_run(tmp_path, baseline=3.0, baseline_name="unigram").is_file()


def test_smoothing_is_a_mean_of_neighbours() -> None:
    assert smoothed([4.0, 2.0]) == [4.0, 2.0], "a short curve stays"
    assert smoothed([]) == []
    straight = [float(step) for step in range(200)]
    assert smoothed(straight) == pytest.approx(straight), "it does not lag behind"
    leap = smoothed([1.0] * 100 + [2.0] * 100)
    assert leap[96] == 1.0 and leap[99] == pytest.approx(1 + 3 / 7) and leap[103] == 2.0
