"""Draws the promise: five ways to run a recipe, their curves and differences, beside a fault.

    python benchmarks/promise.py [--steps 320] [--recipe quickstart] [--compute bfloat16]
        [--reordered] [KEY=VALUE ...]

Runs the recipe in float32 with 1, 2 and 4 replicas as processes and as threads, and once with a
planted mistake (the mean of the micro batches' means). Writes docs/promise.png and
docs/promise.json (losses, largest relative differences, commit), and prints the table; --redraw
draws the picture from that file again. Where a number format is emulated, overrides make the recipe
small enough, and --out keeps the picture away.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from shoal.config.load import load_recipe
from shoal.config.recipe import Recipe
from shoal.engine.job import Instruments
from shoal.launch import local
from shoal.launch.pool import WorkerPool

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = "1 worker"
PLANTED = "planted mistake (2 processes, mean of means)"


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


COLOURS = {"processes": "#1f6f8b", "threads": "#e09f3e", "1 worker": "#8a8a8a"}
"""Of the dots below, by the kind of way; a planted mistake is red."""
MISTAKE = "#b3261e"
TOLERANCE = 1e-5


def draw(curves: dict[str, list[float]], fault: list[float], *, path: Path, about: str) -> None:
    """Above the one curve; below, on a log axis, how far each way is from one worker.

    Steps whose losses are the same to the last bit have no place on a log axis: they are not drawn,
    and counted in words.
    """
    reference = curves[REFERENCE]
    others = {name: losses for name, losses in curves.items() if name != REFERENCE}
    near = {name: differences(losses, reference) for name, losses in others.items()}
    largest = max(max(values) for values in near.values())
    figure = Figure(figsize=(8, 6), layout="constrained")
    figure.suptitle(
        f"One seed, one loss curve: {len(curves)} ways to run, at most {largest:.1e} apart",
        fontsize=12,
        fontweight="bold",
    )
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 3])
    steps = range(1, len(reference) + 1)
    above.plot(steps, reference, color="#333333", linewidth=1.2)
    names = ", ".join(others)
    above.text(
        0.98, 0.95, f"one worker; on the same line: {names}", ha="right", va="top", wrap=True,
        transform=above.transAxes, fontsize=9, color="#333333",
    )  # fmt: skip
    above.set_title(about, fontsize=9, color="#666666", loc="left")
    above.set_ylabel("loss (nats per token)")
    _differences(below, near, far=differences(fault, reference))
    figure.savefig(path, dpi=120)


def _differences(axes: Axes, near: dict[str, list[float]], *, far: list[float]) -> None:
    """The lower part: a dot per way and step, the tolerance, and the planted mistake."""
    for kind, colour in COLOURS.items():
        series = [values for name, values in near.items() if kind in name]
        points = [(n, v) for values in series for n, v in enumerate(values, 1) if v > 0]
        if points:
            label = "one worker, other micro batches" if kind == "1 worker" else kind
            axes.scatter(*zip(*points), s=5, color=colour, linewidths=0, label=label)
    axes.axhline(TOLERANCE, color="#333333", linewidth=1, linestyle="--")
    longest = max(len(values) for values in near.values())
    axes.text(longest, 1.25 * TOLERANCE, f"tolerance of the promise: {TOLERANCE:.0e}", ha="right")
    drawn = [(n, v) for n, v in enumerate(far, 1) if v > 0]
    if drawn:
        axes.plot(*zip(*drawn), color=MISTAKE, linewidth=1.2)
        axes.text(
            drawn[-1][0] + 4, drawn[-1][1], f"{PLANTED}:\nstopped after {len(far)} steps",
            color=MISTAKE, va="center", fontsize=9,
        )  # fmt: skip
    count = sum(len(values) for values in near.values())
    equal = sum(value == 0 for values in near.values() for value in values)
    axes.set_yscale("log")
    axes.set_ylim(bottom=3e-9)
    axes.set_xlabel(
        f"optimizer step      ({equal} of {count} losses are equal bit for bit: no dot)"
    )
    axes.set_ylabel("relative difference\nto one worker")
    axes.legend(frameon=False, fontsize=9, loc="lower right", ncols=3, markerscale=3)
    axes.grid(alpha=0.25)


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
    parser.add_argument("--redraw", action="store_true", help="draw what the file has, run nothing")
    given = parser.parse_args()
    suffix = "" if given.compute == "float32" else f"-{given.compute}"
    picture, file = (given.out / f"promise{suffix}.{end}" for end in ("png", "json"))
    about = f"{given.recipe}, {given.steps} steps, {given.compute}, on CPU cores"
    curves: dict[str, list[float]]
    if given.redraw:
        curves = json.loads(file.read_text())["losses"]
        draw(curves, curves.pop("planted fault"), path=picture, about=about)
        return
    common = {
        "train.stop_after_steps": given.steps,
        "train.evaluate_every_steps": 0,
        "checkpoint.every_steps": 0,
        "task.prompts": [],
        "precision.compute": given.compute,
    }
    curves = {}
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
    draw(curves, fault, path=picture, about=about)
    record = {"commit": commit, "steps": given.steps, "largest_relative_difference": largest}
    file.write_text(json.dumps({**record, "losses": {**curves, "planted fault": fault}}) + "\n")


if __name__ == "__main__":
    main()
