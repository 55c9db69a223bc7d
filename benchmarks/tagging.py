"""The NER recipe with 1 and 2 replicas in float32: its F1, and the largest difference of losses.

python benchmarks/tagging.py [--steps N]      (default: the whole recipe)
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from shoal.launch import local
from shoal.launch.pool import WorkerPool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int)
    given = parser.parse_args()
    early = {} if given.steps is None else {"train.stop_after_steps": given.steps}
    losses: dict[int, list[float]] = {}
    print("| replicas | entity F1 before | after | most frequent tag | seconds |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder, WorkerPool() as pool:
        for replicas in (1, 2):
            overrides = {
                "parallel.replicate": replicas,
                "precision.compute": "float32",
                "train.micro_batch_samples": 16,
                **early,
            }
            out = Path(folder) / str(replicas)
            result = local.train("ner", overrides, out=out, console=False, pool=pool)
            rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            losses[replicas] = [row["loss"] for row in rows if "loss" in row]
            before = result.summary["evaluation_before"]["entity_f1"]
            after = result.summary["evaluation"]
            print(
                f"| {replicas} | {before:.3f} | {after['entity_f1']:.3f} "
                f"| {after['majority_tag_f1']:.3f} | {result.summary['train_seconds']:.0f} |",
                flush=True,
            )
    off = [abs(a - b) / b for a, b in zip(losses[1], losses[2], strict=True)]
    print(f"\nlargest relative difference of {len(off)} losses: {max(off):.2e}")
    eighth = max(1, len(off) // 8)
    print(
        "by eighths:",
        ", ".join(f"{max(off[at : at + eighth]):.1e}" for at in range(0, len(off), eighth)),
    )


if __name__ == "__main__":
    main()
