"""What comparing the replicas' hashes costs: the quickstart with it at every step, and without.

    python benchmarks/hashing.py [--pairs 7] [--steps 20]

Two processes in float32, runs with `sync.verify_every_steps` 1 and 0 in turns, which of a pair
comes first in turns too. Beside the ratio stand the milliseconds that hashing the same state takes
alone: a share that is smaller than the noise of steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import xxhash

from shoal.launch import local
from shoal.launch.pool import WorkerPool
from shoal.observe.events import read_lines

STATE_BYTES = 3 * 4 * 4_200_000
"""Parameters and AdamW's two moments of the quickstart, in float32."""


def step_seconds(out: Path, *, pool: WorkerPool, steps: int, every: int) -> list[float]:
    """Seconds of each step, without the first two."""
    overrides: dict[str, Any] = {
        "parallel.replicate": 2,
        "launch.workers": "processes",
        "precision.compute": "float32",
        "train.steps": steps + 2,
        "train.evaluate_every_steps": 0,
        "checkpoint.every_steps": 0,
        "task.prompts": [],
        "sync.verify_every_steps": every,
    }
    local.train("quickstart", overrides, out=out, console=False, pool=pool)
    rows = [row for row in read_lines(out / "metrics.jsonl") if "loss" in row]
    return [row["step_seconds"] for row in rows][2:]


def alone_seconds() -> float:
    """Seconds to hash the state once, median of nine."""
    state = torch.ones(STATE_BYTES // 4).numpy()
    readings = []
    for _ in range(9):
        began = time.perf_counter()
        xxhash.xxh3_64_intdigest(state.data)
        readings.append(time.perf_counter() - began)
    return statistics.median(readings)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    seconds: dict[int, list[float]] = {0: [], 1: []}
    ratios = []
    with tempfile.TemporaryDirectory() as folder, WorkerPool() as pool:
        for number in range(given.pairs):
            pair = {}
            for every in (0, 1) if number % 2 else (1, 0):
                out = Path(folder) / f"{number}-{every}"
                found = step_seconds(out, pool=pool, steps=given.steps, every=every)
                seconds[every] += found
                pair[every] = statistics.median(found)
            ratios.append(pair[1] / pair[0])
            print(f"pair {number}: {ratios[-1]:.4f}", flush=True)
    without, each = (statistics.median(seconds[every]) for every in (0, 1))
    alone = alone_seconds()
    print("| hashing | median step, ms | of all steps | median of pairs (least to most) |")
    print("| --- | ---: | ---: | ---: |")
    print(f"| never | {1e3 * without:.1f} | 1 | 1 |")
    print(
        f"| every step | {1e3 * each:.1f} | {each / without:.4f} "
        f"| {statistics.median(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f}) |"
    )
    print(
        f"hashing {STATE_BYTES / 1e6:.0f} MB alone: {1e3 * alone:.1f} ms, "
        f"{alone / without:.2%} of a step"
    )


if __name__ == "__main__":
    main()
