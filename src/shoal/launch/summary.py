"""RUN/summary.json, loss.png, and the last words of a run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal.config.load import load_recipe
from shoal.data.registry import PACKAGES
from shoal.engine.decision import Decision
from shoal.errors import Diverged
from shoal.launch.directory import write_whole
from shoal.launch.pictures import draw_picture
from shoal.launch.plot import plot_run
from shoal.observe.events import SHOWN, read_lines
from shoal.tasks.kinds import create

_NOTHING: Mapping[str, int] = {}


def write_summary(
    run: Path,
    *,
    done: dict[str, Any],
    decision: Decision,
    say: Callable[[str], None],
    fetched: Mapping[str, int] = _NOTHING,
) -> dict[str, Any]:
    """Write and return the summary of a run that came to its end (or to stop_after_steps).

    `fetched`: bytes that each host has read from others before it could train.
    """
    rows = read_lines(run / "metrics.jsonl")
    losses = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "evaluation_loss" in row]
    measured = _measured(losses)
    _note_in_plan(run, decision=decision, measured=measured)
    summary = {
        "steps": done["step"],
        "of_steps": done["steps"],
        "final_loss": losses[-1]["loss"] if losses else None,
        "evaluation": _scores(evaluations[-1]) if evaluations else None,
        "evaluation_before": _scores(evaluations[0]) if len(evaluations) > 1 else None,
        "baseline": done["baseline"],
        "ending": done["ending"],
        "best_step": done["best_step"],
        "task": done["task"],
        "tokens": done["tokens"],
        "train_seconds": done["seconds"],
        "tokens_per_second": done["tokens"] / done["seconds"] if done["seconds"] else None,
        "step_seconds": measured.get("step_seconds"),
        "parameters": done["parameters"],
        "peak_memory_bytes": done["peak_memory_bytes"],
        "layout": decision.to_json()["layout"],
        "workers": decision.workers,
        "threads_per_worker": decision.threads_per_worker,
        "micro_batch_samples": decision.micro_batch_samples,
        "compute": decision.compute,
        "measured": decision.measured,
        **({"fetched_bytes": dict(fetched)} if fetched else {}),
        "prediction_error": _error(decision.predicted, measured),
    }
    write_whole(run / "summary.json", json.dumps(summary, indent=1) + "\n")
    task = create(done["task"])
    curve = task.curve
    with _drawing(run / "loss.png", say=say):
        plot_run(
            run,
            unit=curve.unit,
            baseline=done["baseline"].get(curve.baseline),
            baseline_name=curve.baseline_name,
            is_scored=curve.is_scored,
        )
    with _drawing(run / (task.picture or SHOWN), say=say):
        draw_picture(run, done["task"])
    return summary


@contextmanager
def _drawing(path: Path, *, say: Callable[[str], None]) -> Iterator[None]:
    """A font, a disk, matplotlib may fail: the run is whole without a picture."""
    try:
        yield
    except Exception as error:
        say(f"warning: {path} could not be drawn: {type(error).__name__}: {error}")


def check_ending(run: Path, summary: dict[str, Any]) -> None:
    """Raises Diverged for a run that ended so."""
    ending = summary["ending"]
    if ending and ending["kind"] == "diverged":
        raise Diverged(
            f"{run}: ended, since {ending['text']}. Its end was not saved; remove the saves it "
            "made since then, and go on with a lower learning rate: "
            f"shoal resume {run} train.optimizer.learning_rate=..."
        )


def _measured(losses: list[dict[str, Any]]) -> dict[str, float]:
    """What a prediction is held against: the median step without the first, which warms up."""
    steps = [row["step_seconds"] for row in losses[1:] or losses]
    found = {"step_seconds": statistics.median(steps)} if steps else {}
    peaks = [row["peak_memory_bytes"] for row in losses if row.get("peak_memory_bytes")]
    return {**found, "peak_memory_bytes": max(peaks)} if peaks else found


def _note_in_plan(run: Path, *, decision: Decision, measured: dict[str, float]) -> None:
    """Keep prediction and measurement side by side, for the planner to learn from."""
    tree = {**decision.to_json(), "outcome": measured}
    write_whole(run / "plan.json", json.dumps(tree, indent=1) + "\n")


def _error(predicted: dict[str, float], measured: dict[str, float]) -> float | None:
    """Predicted over measured step time, less 1; None where nothing was predicted."""
    if "step_seconds" not in predicted or not measured.get("step_seconds"):
        return None
    return predicted["step_seconds"] / measured["step_seconds"] - 1.0


def _scores(row: dict[str, Any]) -> dict[str, float]:
    skip = {"step", "seconds", "completions"}
    return {key: value for key, value in row.items() if key not in skip}


def last_words(run: Path, summary: dict[str, Any], *, recipe: str) -> list[str]:
    """What the end of a run tells a person."""
    lines = [""]
    made = load_recipe(str(run / "config.yaml"))
    task = create(summary["task"], options=made.task)
    if summary["evaluation"]:
        after = {**summary["evaluation"], **summary["baseline"]}
        lines += task.words(summary["evaluation_before"], after)
    ending = summary["ending"]
    if ending:
        lines.append(f"ended at step {summary['steps']} of {summary['of_steps']}: {ending['text']}")
    lines.append(_speed(summary, of=task.target_name))
    for name in ("loss.png", task.picture):
        if name is not None and (run / name).is_file():
            lines.append(f"picture: {run / name}")
    if (run / "model").is_dir():
        lines.append(f"model:   {run / 'model'}")
    if summary["steps"] < summary["of_steps"] and not ending:
        lines += ["", f"  shoal resume {run}"]
        return lines
    lines += ["", "next:"]
    lines.append(f"  {task.next_command(run=str(run), recipe=recipe)}")
    lines.append(f"  shoal parity {recipe} {_layout_words(summary['layout'])}")
    if any(each.source in PACKAGES for each in made.data.sources):
        lines.append(f"  shoal train {recipe} data.source={task.own_data}")
    return lines


def _layout_words(layout: dict[str, int]) -> str:
    """The layout as overrides; of one worker, what a proof would compare it with."""
    words = [f"parallel.{axis}={degree}" for axis, degree in layout.items() if degree > 1]
    return " ".join(words or ["parallel.replicate=2"])


def _speed(summary: dict[str, Any], *, of: str) -> str:
    rate = summary["tokens_per_second"] or 0.0
    text = f"speed: {rate:,.0f} {of} per second"
    measured = summary["measured"]
    if "speedup" in measured:
        text += (
            f"; {measured['speedup']:.2f} x as fast as {measured['beside']} (timed in turns before "
            "the start)"
        )
    return text
