"""Draws the promise: five ways to run a recipe, their curves and differences, beside a fault.

    python benchmarks/promise.py [--steps 320] [--recipe quickstart] [--compute bfloat16]
        [--reordered] [KEY=VALUE ...]

Runs the recipe in float32 with 1, 2 and 4 replicas as processes and as threads, and once with a
planted mistake (the mean of the micro batches' means). Writes docs/promise.png and
docs/promise.json (losses, largest relative differences, commit), and prints the table. Where a
number format is emulated, overrides make the recipe small enough, and --out keeps the picture away.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

from shoal.config.load import load_recipe
from shoal.config.recipe import Recipe
from shoal.engine.job import Instruments
from shoal.launch import local
from shoal.launch.pool import WorkerPool

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = "1 worker"
PLANTED = "2 processes, mean of means (planted)"


def ways(*, reordered: bool) -> dict[str, dict[str, object]]:
    """Name -> overrides. The micro batch follows from each replica's share.

    `reordered` adds one worker that sums in other orders: the band of what rounding alone does.
    """
    found: dict[str, dict[str, object]] = {
        REFERENCE: {"parallel.replicate": 1, "launch.workers": "processes"}
    }
    for degree in (2, 4):
        for kind in ("processes", "threads"):
            found[f"{degree} {kind}"] = {"parallel.replicate": degree, "launch.workers": kind}
    if reordered:
        for micro in (4, 2, 1):
            name = f"1 worker, micro batch {micro}"
            found[name] = {**found[REFERENCE], "train.micro_batch_samples": micro}
    return found


def losses_of(recipe: Recipe, *, out: Path, pool: WorkerPool, fault: str | None) -> list[float]:
    """Loss of every step of a run."""
    instruments = Instruments(mistake=fault)
    local.train(recipe, out=out, console=False, pool=pool, instruments=instruments)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def differences(found: list[float], reference: list[float]) -> list[float]:
    """Relative difference of each step's loss."""
    return [abs(a - b) / abs(b) for a, b in zip(found, reference, strict=False)]


def draw(curves: dict[str, list[float]], fault: list[float], *, path: Path, title: str) -> None:
    """Above the curves; below, on a log axis, how far each is from one worker."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    reference = curves[REFERENCE]
    steps = range(1, len(reference) + 1)
    for number, (name, losses) in enumerate(curves.items()):
        width = 5.0 - 0.75 * number  # all lie on one another: thin ones on top of thick ones
        above.plot(steps, losses, linewidth=width, label=name)
        if name != REFERENCE:
            near = [max(value, 1e-10) for value in differences(losses, reference)]
            below.plot(steps, near, linewidth=1, color=above.lines[-1].get_color())
    above.plot(steps[: len(fault)], fault, "k--", linewidth=1, label=PLANTED)
    far = [max(value, 1e-10) for value in differences(fault, reference)]
    below.plot(steps[: len(fault)], far, "k--", linewidth=1)
    below.axhline(1e-5, color="#999999", linewidth=0.8)
    below.text(1, 1.3e-5, "the promise: 1e-5", fontsize=8, color="#666666")
    below.set_yscale("log")
    above.set_ylabel("loss (nats per token)")
    below.set_ylabel("relative difference\nto one worker")
    below.set_xlabel("optimizer step")
    above.set_title(title)
    above.legend(frameon=False, fontsize=8)
    for axes in (above, below):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of the recipe, for all ways")
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument(
        "--reordered", action="store_true", help="add one worker, micro batches 4, 2, 1"
    )
    parser.add_argument("--fault-steps", type=int, default=80, help="steps of the planted fault")
    parser.add_argument("--compute", default="float32")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    given = parser.parse_args()
    common = {
        "train.stop_after_steps": given.steps,
        "train.evaluate_every_steps": 0,
        "checkpoint.every_steps": 0,
        "task.prompts": [],
        "precision.compute": given.compute,
    }
    curves: dict[str, list[float]] = {}
    fault: list[float] = []
    with tempfile.TemporaryDirectory() as folder, WorkerPool() as pool:
        plans = {**ways(reordered=given.reordered), "fault": {}}
        plans["fault"] = plans["2 processes"]
        for number, (name, overrides) in enumerate(plans.items()):
            if name == "fault":
                overrides = {**overrides, "train.stop_after_steps": given.fault_steps}
            texts = [f"{key}={json.dumps(value)}" for key, value in {**common, **overrides}.items()]
            recipe = load_recipe(given.recipe, [*texts, *given.overrides])
            planted = "mean-of-means" if name == "fault" else None
            losses = losses_of(recipe, out=Path(folder) / str(number), pool=pool, fault=planted)
            if planted:
                fault = losses
            else:
                curves[name] = losses
            against = differences(losses, curves[REFERENCE])
            print(
                f"{name}: last loss {losses[-1]:.6f}, largest difference {max(against):.2e}",
                flush=True,
            )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    largest = {name: max(differences(v, curves[REFERENCE])) for name, v in curves.items()}
    largest["planted fault"] = max(differences(fault, curves[REFERENCE]))
    suffix = "" if given.compute == "float32" else f"-{given.compute}"
    title = f"{given.recipe}, {given.steps} steps, {given.compute}: one seed, one loss curve"
    draw(curves, fault, path=given.out / f"promise{suffix}.png", title=title)
    record = {"commit": commit, "steps": given.steps, "largest_relative_difference": largest}
    (given.out / f"promise{suffix}.json").write_text(
        json.dumps({**record, "losses": {**curves, "planted fault": fault}}) + "\n"
    )


if __name__ == "__main__":
    main()
