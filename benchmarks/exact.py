"""What exact mode costs: the quickstart with 2 threads, exact and not, interleaved.

python benchmarks/exact.py [--pairs 5] [--steps 10]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from shoal.launch import local
from shoal.launch.pool import WorkerPool

COMMON = {
    "parallel.replicate": 2,
    "launch.workers": "threads",
    "train.micro_batch_samples": 2,
    "train.evaluate_every_steps": 0,
    "checkpoint.every_steps": 0,
    "task.prompts": [],
}


def step_seconds(out: Path, *, pool: WorkerPool, steps: int, exact: bool) -> float:
    """Median step of a run, without the first two."""
    overrides = {**COMMON, "train.steps": steps, "train.exact": exact}
    local.train("quickstart", overrides, out=out, console=False, pool=pool)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([row["step_seconds"] for row in rows if "loss" in row][2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    pairs = []
    with tempfile.TemporaryDirectory() as folder, WorkerPool() as pool:
        for number in range(given.pairs):
            plain, exact = (
                step_seconds(
                    Path(folder) / f"{number}-{exact}", pool=pool, steps=given.steps, exact=exact
                )
                for exact in (False, True)
            )
            pairs.append((plain, exact))
    ratio = statistics.median(plain / exact for plain, exact in pairs)
    plain, exact = (statistics.median(column) for column in zip(*pairs))
    print("| mode | step, ms | tokens per second against not exact |\n| --- | ---: | ---: |")
    print(f"| not exact, same micro batch | {plain * 1000:.0f} | 1 |")
    print(f"| exact | {exact * 1000:.0f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
