"""What comparing the replicas' hashes costs: the quickstart with it before every second step.

    python benchmarks/hashing.py [--pairs 100]

Two processes in float32. A step with the hash and one without take turns within one run, since
runs of one minute and the next differ by more than what is looked for. Two figures: the time that
hashing takes inside the steps (the loop's own span), and the steps with it over those beside them,
with the central 95 % of their bootstrapped median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from peers import interval
from shoal.launch import local
from shoal.launch.pool import WorkerPool
from shoal.observe.events import read_lines

WARMING = 4
"""Steps at the start that do not count."""


def run(out: Path, *, pool: WorkerPool, pairs: int) -> tuple[dict[int, float], list[float]]:
    """Seconds by step (from 1), and the milliseconds of each hash on rank 0."""
    overrides: dict[str, Any] = {
        "parallel.replicate": 2,
        "launch.workers": "processes",
        "precision.compute": "float32",
        "train.steps": 2 * pairs + WARMING,
        "train.evaluate_every_steps": 0,
        "checkpoint.every_steps": 0,
        "task.prompts": [],
        "sync.verify_every_steps": 2,
        "observe.trace": True,
        "observe.log_every_steps": 1,
    }
    local.train("quickstart", overrides, out=out, console=False, pool=pool)
    rows = [row for row in read_lines(out / "metrics.jsonl") if "loss" in row]
    spans = json.loads((out / "trace.json").read_text())["traceEvents"]
    hashes = [s for s in spans if s["name"] == "verify" and s["tid"] == 0]
    hashes = [s for s in hashes if s["args"]["step"] >= WARMING]
    return {row["step"]: row["step_seconds"] for row in rows}, [s["dur"] / 1e3 for s in hashes]


def main() -> None:
    """Print both figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, WorkerPool() as pool:
        seconds, hashes = run(Path(folder) / "run", pool=pool, pairs=given.pairs)
    # step n of the log was hashed before it when n - 1 is even; pairs in both orders
    hashed = [n for n in seconds if n > WARMING and n % 2 and n + 1 in seconds]
    ratios = [2 * seconds[n] / (seconds[n - 1] + seconds[n + 1]) for n in hashed]
    step, alone = statistics.median(seconds[n + 1] for n in hashed), statistics.median(hashes)
    low, high = interval(ratios, share=0.95)
    print(f"step {1e3 * step:.0f} ms, hash inside it {alone:.1f} ms: {alone / 1e3 / step:.2%}")
    print(
        f"steps with a hash over their neighbours without: {statistics.median(ratios):.4f} "
        f"({low:.4f} to {high:.4f}, {len(ratios)} of them)"
    )


if __name__ == "__main__":
    main()
