"""One replica of two takes three times as long for a micro batch: equal shares against measured.

python benchmarks/uneven.py [--pairs 5] [--steps 32] [--slower 3]

The slow replica sleeps before every forward, in proportion to its work. Tokens per second are those
of the median step of the second half, by when shares are agreed; for local-sgd of the time of a
whole round, both replicas' tokens counted. Alternating pairs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from servers import SMALL
from shoal.engine.job import Instruments
from shoal.launch import local
from shoal.launch.pool import WorkerPool
from shoal.observe.events import read_lines

WAYS = {
    "every-step": {"kind": "every-step"},
    "local-sgd H=8": {"kind": "local-sgd", "every_steps": 8},
}
FAST: dict[str, Any] = {**SMALL, "train.global_batch_samples": 16, "train.micro_batch_samples": 2}
FAST |= {"data.evaluation_samples": 16, "parallel.replicate": 2, "launch.workers": "processes"}


def seconds_a_step(pool: WorkerPool, out: Path, how: dict[str, Any], **more: Any) -> float:
    """Of the second half of a run, a whole number of rounds."""
    local.train("sync-bench", how, out=out, console=False, pool=pool, **more)
    rows = [row for row in read_lines(out / "metrics.jsonl") if "loss" in row]
    half = rows[len(rows) // 2 :]
    return statistics.mean(row["step_seconds"] for row in half)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--slower", type=float, default=3.0)
    given = parser.parse_args()
    print("| policy | equal, s/step | measured, s/step | tokens/s, measured over equal | pairs |")
    print("| --- | ---: | ---: | ---: | --- |")
    with tempfile.TemporaryDirectory() as text, WorkerPool() as pool:
        folder = Path(text)
        micro = _micro_seconds(pool, folder / "even")
        fault = {"kind": "slow", "rank": 1, "step": 1, "number": 0}
        fault["argument"] = str((given.slower - 1) * micro)
        for name, sync in WAYS.items():
            found: list[tuple[float, float]] = []
            for number in range(given.pairs):
                pair = []
                for shares in ("equal", "measured"):
                    how = {**FAST, "sync": {**sync, "shares": shares}, "train.steps": given.steps}
                    planned = Instruments(planned_faults=(fault,))
                    out = folder / f"{name}-{number}-{shares}"
                    pair.append(seconds_a_step(pool, out, how, instruments=planned))
                found.append((pair[0], pair[1]))
            ratios = [equal / measured for equal, measured in found]
            each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            equal, measured = (statistics.median(column) for column in zip(*found))
            middle = statistics.median(ratios)
            print(f"| {name} | {equal:.3f} | {measured:.3f} | {middle:.2f} | {each} |")


def _micro_seconds(pool: WorkerPool, out: Path) -> float:
    """What a micro batch takes on a replica that nothing slows down."""
    how = {**FAST, "train.steps": 12}
    local.train("sync-bench", how, out=out, console=False, pool=pool)
    rows = [row for row in read_lines(out / "metrics.jsonl") if "loss" in row][3:]
    return statistics.median(row["compute_seconds"] for row in rows) / 4


if __name__ == "__main__":
    main()
