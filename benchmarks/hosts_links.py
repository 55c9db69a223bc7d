"""What a fault between three hosts costs a run over them, several times in a row each.

    python benchmarks/hosts_links.py [--times 5] [--only NAME ...]

Seconds from the fault to the next committed step, in the lab of tests/hosts (root only). After each
the fault is undone and the host is taken in again; at the end every step is there once, with the
losses of one machine. From the second time on a host rests before that (10 s, 20 s, 40 s, ...).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from hosts.lab import Lab
from hosts.test_agents_over_hosts import SHRINKS, Cluster, Training, worker_of
from hosts.test_links_over_hosts import taken_back
from shoal.launch.pool import WorkerPool
from tiny import Bench

Fault = tuple[str, Callable[[], object], Callable[[], object]]
"""The event that notices it, what brings it about, and what undoes it."""


def faults_of(cluster: Cluster) -> dict[str, Fault]:
    lab, (_, h2, h3) = cluster.lab, cluster.hosts
    kill = ["kill", "-9"]
    return {
        "worker": ("lost", lambda: h2.run(*kill, worker_of(h2)), nothing),
        "cut": ("left-out", lambda: lab.cut(h2, h3), lab.heal),
        "one-way": ("left-out", lambda: lab.cut_one_way(h2, h3), lab.heal),
        "stopped": ("lost", h3.freeze, h3.thaw),
        "cut-off": ("lost", lambda: lab.cut(h3), lab.heal),
    }


def tried(training: Training, fault: Fault, *, times: int) -> list[float]:
    event, begin, end = fault
    seconds = []
    for number in range(times):
        seconds.append(training.lose(begin, event=event))
        print(f"  {seconds[-1]:.2f} s at load {os.getloadavg()[0]:.0f}", flush=True)
        if end is nothing:
            all_train(training)  # before the next: four deaths at one step end a run
        elif number == times - 1:
            end()
        else:
            taken_back(training, end)
    return seconds


def all_train(training: Training) -> None:
    """Wait until the worker that has taken the lost one's place has trained for a while."""
    training.until(lambda: training.events("generation")[-1]["members"] == [0, 1, 2])
    steps = training.steps()
    training.until(lambda: training.steps() > steps + 100)


def nothing() -> None:
    """What undoes a fault that others mend."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--times", type=int, default=5)
    arguments.add_argument("--only", nargs="*", default=[])
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name, WorkerPool() as pool:
        folder = Path(name)
        (folder / "lab").mkdir()
        bench = Bench(folder, pool=pool)
        with Lab(3, folder / "lab") as lab:
            cluster = Cluster(lab, folder / "lab")
            for what, fault in faults_of(cluster).items():
                if given.only and what not in given.only:
                    continue
                print(what, flush=True)
                training = cluster.begin(bench, 3, *SHRINKS, out=folder / what)
                seconds = tried(training, fault, times=given.times)
                training.stop()
                training.check_steps(bench, *SHRINKS)
                listed = ", ".join(f"{each:.2f}" for each in seconds)
                print(f"{what}: {listed} s; every step once, losses equal", flush=True)


if __name__ == "__main__":
    main()
