"""RUN/summary.json, loss.png, and the last words of a run."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from shoal.engine.decision import Decision
from shoal.launch.directory import write_whole
from shoal.launch.plot import plot_run
from shoal.observe.events import read_lines


def write_summary(run: Path, *, done: dict[str, Any], decision: Decision) -> dict[str, Any]:
    """Write and return the summary of a run that came to its end (or to stop_after_steps)."""
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
        "unigram_loss": done["unigram_nats"],
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
        "prediction_error": _error(decision.predicted, measured),
    }
    write_whole(run / "summary.json", json.dumps(summary, indent=1) + "\n")
    plot_run(
        run,
        unit="nats per token",
        baseline=done["unigram_nats"] if _is_language(evaluations) else None,
        baseline_name="unigram baseline",
    )
    return summary


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


def _is_language(evaluations: list[dict[str, Any]]) -> bool:
    return bool(evaluations) and "perplexity" in evaluations[-1]


def _scores(row: dict[str, Any]) -> dict[str, float]:
    skip = {"step", "seconds", "completions"}
    return {key: value for key, value in row.items() if key not in skip}


def last_words(run: Path, summary: dict[str, Any], *, recipe: str) -> list[str]:
    """What the end of a run tells a person."""
    lines = [""]
    after, before = summary["evaluation"], summary["evaluation_before"]
    if after and "perplexity" in after:
        guess = math.exp(summary["unigram_loss"])
        was = f"{before['perplexity']:.0f} before, " if before else ""
        lines.append(
            f"perplexity: {was}{after['perplexity']:.1f} now; guessing by word frequency: "
            f"{guess:.0f} (loss {after['evaluation_loss']:.3f} against "
            f"{summary['unigram_loss']:.3f} nats, ratio "
            f"{after['evaluation_loss'] / summary['unigram_loss']:.3f})"
        )
    if after and "entity_f1" in after:
        was = f"{before['entity_f1']:.3f} before, " if before else ""
        lines.append(
            f"entity F1: {was}{after['entity_f1']:.3f} now; the most frequent tag for every word: "
            f"{after['majority_tag_f1']:.3f}"
        )
    lines.append(_speed(summary))
    lines.append(f"picture: {run / 'loss.png'}")
    if (run / "model").is_dir():
        lines.append(f"model:   {run / 'model'}")
    if summary["steps"] < summary["of_steps"]:
        lines += ["", f"  shoal resume {run}"]
        return lines
    lines += ["", "next:"]
    if after and "perplexity" in after:
        lines.append(f'  shoal generate {run / "model"} "A: Hello, how are you?"')
    else:
        lines.append(f"  shoal evaluate {run} {recipe}")
    lines.append(f"  shoal parity {recipe} {_layout_words(summary['layout'])}")
    lines.append(f"  shoal train {recipe} data.source=YOUR.txt")
    return lines


def _layout_words(layout: dict[str, int]) -> str:
    """The layout as overrides; of one worker, what a proof would compare it with."""
    words = [f"parallel.{axis}={degree}" for axis, degree in layout.items() if degree > 1]
    return " ".join(words or ["parallel.replicate=2"])


def _speed(summary: dict[str, Any]) -> str:
    rate = summary["tokens_per_second"] or 0.0
    text = f"speed: {rate:,.0f} target tokens per second"
    measured = summary["measured"]
    if "speedup" in measured:
        text += f"; {measured['speedup']:.2f} x one worker (timed in turns)"
    elif measured.get("why_one"):
        text += f"; {measured['why_one']}"
    return text
