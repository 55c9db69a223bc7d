"""Random schedules of faults upon a run over three hosts: whatever happens, the same losses.

    python benchmarks/hosts_random.py [--schedules 20] [--first 0]

In the lab of tests/hosts (root only), with an etcd and a coordinator on each host. See
tests/hosts/random_faults.py for what happens, and what is checked.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from hosts.lab import Lab
from hosts.random_faults import Schedule
from hosts.test_elected_over_hosts import Elected, steps
from shoal.launch.pool import WorkerPool
from tiny import Bench


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--schedules", type=int, default=20)
    arguments.add_argument("--first", type=int, default=0)
    given = arguments.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as name, WorkerPool() as pool:
        bench = Bench(Path(name), pool=pool)
        for seed in range(given.first, given.first + given.schedules):
            folder, began = Path(name) / str(seed), time.monotonic()
            (folder / "lab").mkdir(parents=True)
            with Lab(3, folder / "lab") as lab:
                cluster = Elected(lab, folder / "lab")
                schedule = Schedule(seed, bench=bench, cluster=cluster, folder=folder)
                try:
                    schedule.play()
                    result = "holds"
                except AssertionError as error:
                    failed, result = failed + 1, f"FAILED\n{error}"
            print(f"schedule {seed}, {time.monotonic() - began:.0f} s: {result}")
            print(f"  {'; '.join(schedule.story)}")
            commits = sorted(set(schedule.commits))
            print(f"  {len(steps(folder / 'run'))} steps, commits {commits}", flush=True)
    print(f"{given.schedules - failed} of {given.schedules} hold")


if __name__ == "__main__":
    main()
