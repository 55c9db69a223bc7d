"""From the command to the first step: shoal's fork server beside the same command under torchrun.

    python benchmarks/start.py [--rounds 5] [--workers 2 4]

Both run `shoal train quickstart` with data already prepared; the clock stops when rank 0 announces
the first step. Interleaved; prints medians and the median of the pairwise ratios.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHOAL = Path(sys.executable).parent / "shoal"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}


def seconds_to_first_step(command: list[str]) -> float:
    """Start `command`, stop the clock at its announcement, end it."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "the first step" in line:
            found = time.perf_counter() - began
            end(process)
            return found
    raise SystemExit(f"{' '.join(command)} never came to the first step:\n{''.join(seen)}")


def end(process: subprocess.Popen[str]) -> None:
    """End a launcher and its workers; torchrun's are in sessions of their own, so it ends them."""
    process.terminate()
    try:
        process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="*", default=[2, 4])
    given = parser.parse_args()
    print(
        "| workers | shoal, s | torchrun, s | ratio | goal |\n| ---: | ---: | ---: | ---: | --- |"
    )
    with tempfile.TemporaryDirectory() as folder:
        for workers in given.workers:
            pairs = []
            for number in range(-1, given.rounds):
                words = ["train", "quickstart", f"parallel.replicate={workers}"]
                words += ["launch.workers=processes", "train.evaluate_every_steps=0"]
                out = Path(folder) / f"{workers}-{number}"
                own = seconds_to_first_step([str(SHOAL), *words, "--out", f"{out}-own"])
                launcher = [sys.executable, "-m", "torch.distributed.run"]
                launcher += ["--nproc-per-node", str(workers), "--no-python", str(SHOAL)]
                other = seconds_to_first_step([*launcher, *words, "--out", f"{out}-torchrun"])
                print(f"{workers} workers: {own:.2f} s, {other:.2f} s", file=sys.stderr, flush=True)
                if number >= 0:
                    pairs.append((own, other))
            ratio = statistics.median(a / b for a, b in pairs)
            own, other = (statistics.median(column) for column in zip(*pairs))
            print(f"| {workers} | {own:.2f} | {other:.2f} | {ratio:.2f} | <= 0.6 |", flush=True)


if __name__ == "__main__":
    main()
