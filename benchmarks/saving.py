"""What saving costs the steps: the stall, and the throughput lost while a save is written.

    python benchmarks/saving.py [--saves 200] [--workers processes]

The quickstart (4.2M parameters, AdamW: 50 MB of state) with two workers saves after every second
step, so that a step beside which a save is written and a step without one take turns: both
columns come from the same run and minute. `stall` is the time for which the loop does nothing
but save.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.launch import local
from shoal.launch.pool import WorkerPool
from shoal.observe.events import read_lines


@dataclass(frozen=True)
class Figures:
    """Of one run, in seconds."""

    stalls: list[float]
    writes: list[float]
    beside: list[float]
    """Steps during which a save was written."""
    alone: list[float]


def run(out: Path, *, saves: int, background: bool, workers: str, pool: WorkerPool) -> Figures:
    """Train 2 x `saves` steps, after a few to warm up."""
    overrides: dict[str, Any] = {
        "parallel.replicate": 2,
        "launch.workers": workers,
        "train.steps": 2 * saves + 5,
        "train.evaluate_every_steps": 0,
        "task.prompts": [],
        "checkpoint.every_steps": 2,
        "checkpoint.background": background,
    }
    local.train("quickstart", overrides, out=out, console=False, pool=pool)
    rows = read_lines(out / "metrics.jsonl")
    seconds = {row["step"]: row["step_seconds"] for row in rows if "loss" in row}
    saved = [row for row in read_lines(out / "events.jsonl") if row["event"] == "saved"]
    last = max(seconds)
    saved = [row for row in saved if 2 < row["step"] < last]  # the last one is waited for
    beside = [seconds[row["step"] + 1] for row in saved if row["step"] + 1 < last]
    alone = [seconds[row["step"]] for row in saved]
    return Figures(
        [row["stall_seconds"] for row in saved], [row["seconds"] for row in saved], beside, alone
    )


def quantile(values: list[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def line(name: str, found: Figures) -> str:
    """One row of the table."""
    step = statistics.median(found.alone)
    lost = 1 - step / statistics.median(found.beside)
    middle, high = quantile(found.stalls, 0.5), quantile(found.stalls, 0.99)
    return (
        f"| {name} | {len(found.stalls)} | {1e3 * step:.0f} | {1e3 * middle:.1f} | "
        f"{1e3 * high:.1f} | {100 * middle / step:.1f} % | {100 * high / step:.1f} % | "
        f"{1e3 * statistics.median(found.writes):.0f} | {100 * lost:.1f} % |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saves", type=int, default=200)
    parser.add_argument("--workers", choices=["threads", "processes"], default="processes")
    given = parser.parse_args()
    print(
        "| save | saves | step, ms | stall p50, ms | p99, ms | p50 of a step | p99 of a step ",
        end="",
    )
    print("| until published, ms | throughput lost beside it |")
    print("| --- |" + " ---: |" * 8)
    with tempfile.TemporaryDirectory() as folder, WorkerPool() as pool:
        for background in (True, False):
            name = f"{'background' if background else 'foreground'}, {given.workers}"
            saves = given.saves if background else max(2, given.saves // 8)
            found = run(
                Path(folder) / name,
                saves=saves,
                background=background,
                workers=given.workers,
                pool=pool,
            )
            print(line(name, found), flush=True)


if __name__ == "__main__":
    main()
