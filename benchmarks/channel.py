"""How long a joining worker waits for the state of a living one: the channel, by size.

    python benchmarks/channel.py

Donor and receiver are two processes; each figure is the median and the largest of 20 hand-overs
into tensors that exist, connection, encryption and hashing included.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from shoal.comm.channel import Donor, fetch
from shoal.comm.keys import Keys

REPEATS = 20


def donate(folder: Path, numel: int) -> None:
    """The donor's process: serves until its input ends."""
    tensors = {kind: torch.randn(numel) for kind in ("parameter", "exp_avg", "exp_avg_sq")}
    with Donor(tensors, keys=Keys.read(folder), generation=1) as donor:
        print(donor.address, flush=True)
        sys.stdin.read()


def measure(keys: Keys, folder: Path, numel: int) -> list[float]:
    """Seconds of each hand-over of three vectors of `numel` floats."""
    words = [sys.executable, __file__, str(folder), str(numel)]
    mine = {kind: torch.empty(numel) for kind in ("parameter", "exp_avg", "exp_avg_sq")}
    found = []
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        for _ in range(REPEATS):
            began = time.perf_counter()
            fetch(address, keys=keys, generation=1, timeout_seconds=60, into=mine)
            found.append(time.perf_counter() - began)
        process.communicate("")
    return found


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "keys"
        keys = Keys.make(folder)
        print("| state | median s | largest s | MB/s |\n| ---: | ---: | ---: | ---: |")
        for numel in (100_000, 4_200_000, 25_000_000):
            found = measure(keys, folder, numel)
            size, middle = 12 * numel / 1e6, statistics.median(found)
            print(f"| {size:.1f} MB | {middle:.3f} | {max(found):.3f} | {size / middle:.0f} |")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        donate(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        main()
