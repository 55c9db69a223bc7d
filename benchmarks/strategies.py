"""What shoal's machinery costs: one worker and two along an axis beside hand-written torch loops.

    python benchmarks/strategies.py [--pairs 7] [--steps 6] [--only NAME ...]

The same model (the quickstart's), rows and micro batches in float32 on 2 cores, interleaved runs,
median ratios of step time; above 1 shoal is faster. Marks: one worker >= 0.98, the others >= 0.95.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from peers import ENVIRONMENT, HERE, interval, quickstart_rows, run, shoal_command

MARKS = {"plain": 0.98, "shard": 0.95, "tensor": 0.95, "pipeline": 0.95}
LAYOUTS = {
    "plain": ("parallel.replicate=1",),
    "shard": ("parallel={shard: 2}",),
    "tensor": ("parallel={tensor: 2}",),
    "pipeline": ("parallel={pipeline: 2}",),
}


def baseline(kind: str, arguments: list[str]) -> list[str]:
    """The command of a hand-written loop."""
    count = 1 if kind == "plain" else 2
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if count > 1 else []
    return [sys.executable, *launcher, str(HERE / "baseline_strategies.py"), kind, *arguments]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--only", nargs="*", choices=list(MARKS), default=list(MARKS))
    given = parser.parse_args()
    ENVIRONMENT["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        tokens, config = quickstart_rows(given.steps)
        np.save(scratch / "tokens.npy", tokens)
        arguments = ["--tokens", str(scratch / "tokens.npy"), "--config", json.dumps(config)]

        def micro(kind: str) -> str:
            """Of a pipeline half as large: four of a step's 16 rows, so that it is filled."""
            return str(given.micro // 2 if kind == "pipeline" else given.micro)

        def ours(kind: str, number: int) -> float:
            out = scratch / f"{kind}-{number}"
            words = [
                *LAYOUTS[kind],
                f"train.micro_batch_samples={micro(kind)}",
                "precision.compute=float32",
                "launch.workers=processes",
                "launch.threads_per_worker=1",
            ]
            return run(shoal_command(out, given.steps, *words), out=out)["step"]

        def theirs(kind: str, number: int) -> float:
            return run(baseline(kind, [*arguments, "--micro", micro(kind)]), out=None)["step"]

        both: list[tuple[str, Callable[[str, int], float]]] = [("ours", ours), ("theirs", theirs)]
        found: dict[str, list[float]] = {kind: [] for kind in given.only}
        for number in range(-1, given.pairs):  # the first round warms caches and is not counted
            for kind in given.only:
                order = both if number % 2 else both[::-1]
                seconds = {name: call(kind, number) for name, call in order}
                shown = ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items())
                print(f"round {number}: {kind}: {shown}", file=sys.stderr, flush=True)
                if number >= 0:
                    found[kind].append(seconds["theirs"] / seconds["ours"])
    print("| strategy | median ratio | 90 % interval | mark |\n| --- | ---: | --- | ---: |")
    for kind, ratios in found.items():
        low, high = interval(ratios)
        middle = statistics.median(ratios)
        print(f"| {kind} | {middle:.3f} | {low:.3f} to {high:.3f} | >= {MARKS[kind]} |")


if __name__ == "__main__":
    main()
