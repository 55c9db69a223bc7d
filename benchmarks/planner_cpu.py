"""The planner's memory formula on this machine: layouts of two models, predicted against measured.

    python benchmarks/planner_cpu.py [--out FOLDER]

Each layout trains three steps; the peak of live tensors of one worker is held against what
plan.json predicted before the start. How the cores are used is not predicted but timed:
benchmarks/start.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from shoal.launch import local
from shoal.launch.pool import WorkerPool

LARGER = [
    "model.hidden_size=512",
    "model.intermediate_size=1720",
    "model.num_attention_heads=8",
    "model.num_key_value_heads=8",
]
"""Four times the width of the quickstart's model."""

# (replicas, kind of worker, threads of each, micro batch, number format)
LAYOUTS: list[tuple[int, str, int, int, str]] = [
    (1, "processes", 1, 4, "float32"),
    (1, "processes", 2, 8, "float32"),
    (2, "threads", 1, 2, "float32"),
    (2, "threads", 1, 8, "float32"),
    (2, "processes", 1, 4, "float32"),
    (4, "threads", 1, 2, "float32"),
    (1, "processes", 2, 2, "bfloat16"),
    (2, "threads", 1, 1, "bfloat16"),
]


def peaks(layout: tuple[int, str, int, int, str], *, larger: bool, out: Path, pool: WorkerPool):
    """(predicted, measured) bytes of one worker."""
    replicate, kind, threads, micro, compute = layout
    words = [
        *(LARGER if larger else []),
        "train.steps=3",
        f"train.global_batch_samples={16 if compute == 'float32' else 4}",
        "train.evaluate_every_steps=0",
        "checkpoint.every_steps=0",
        "task.prompts=[]",
        f"parallel={{replicate: {replicate}}}",
        f"launch.workers={kind}",
        f"launch.threads_per_worker={threads}",
        f"train.micro_batch_samples={micro}",
        f"precision.compute={compute}",
    ]
    local.train("quickstart", words, out=out, console=False, pool=pool)
    plan = json.loads((out / "plan.json").read_text())
    return plan["predicted"]["peak_memory_bytes"], plan["outcome"]["peak_memory_bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/planner_cpu"))
    given = parser.parse_args()
    print("| layout | peak MB | predicted MB | error |\n| --- | ---: | ---: | ---: |")
    errors = []
    with WorkerPool() as pool:
        for larger in (False, True):
            for layout in LAYOUTS:
                name = "-".join(["larger" if larger else "quickstart", *map(str, layout)])
                guess, real = peaks(layout, larger=larger, out=given.out / name, pool=pool)
                errors.append(guess / real - 1)
                row = f"{real / 1e6:.1f} | {guess / 1e6:.1f} | {errors[-1]:+.1%}"
                print(f"| {name} | {row} |", flush=True)
    absolute = [abs(error) for error in errors]
    print(f"median error {statistics.median(absolute):.1%}, worst {max(absolute):.1%}")


if __name__ == "__main__":
    main()
