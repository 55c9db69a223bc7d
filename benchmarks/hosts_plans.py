"""What steps take in several layouts over two hosts with a slow cable, beside what is predicted.

    python benchmarks/hosts_plans.py [--rate 20mbit] [--steps 12] [--rounds 3]

Two hosts of the lab of tests/hosts (root only), two workers of one thread on each; all layouts in
turns. A step's time is the median of all its runs' steps but the first of each. `parallel: auto`
is asked first: its choice is marked.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from hosts.lab import Lab
from hosts.test_agents_over_hosts import Cluster
from shoal.config.load import load_recipe
from shoal.launch.choose import workload_for
from shoal.launch.pool import WorkerPool
from shoal.launch.prepare import prepare_inputs
from shoal.layout import Layout
from shoal.plan.over_hosts import Hosts, Link, price
from shoal.plan.workload import Candidate
from tiny import Bench, Run

LAYOUTS = (
    Layout(pipeline=2, tensor=2),
    Layout(replicate=2, pipeline=2),
    Layout(replicate=2, tensor=2),
    Layout(replicate=4),
    Layout(tensor=4),
)
GROUPS = ("parallel={replicate: 4}", "sync={kind: every-step, group_replicas: 2}")
FIXED = ("train.micro_batch_samples=4", "train.evaluate_every_steps=0", "checkpoint.every_steps=0")
WIDER = ("model.num_key_value_heads=4",)


def words_of(layout: Layout) -> str:
    degrees = {"replicate": layout.replicate}
    degrees |= {axis: n for axis in ("pipeline", "tensor") if (n := layout.degree(axis)) > 1}
    return f"parallel={{{', '.join(f'{axis}: {n}' for axis, n in degrees.items())}}}"


def trained(cluster: Cluster, bench: Bench, *words: str, out: Path) -> Run:
    training = cluster.begin(bench, 2, *words, out=out)
    if training.process.wait() != 0:
        raise SystemExit(training.log.read_text())
    return training.run


def predicted(plan: dict, bench: Bench, layout: Layout) -> float:
    """Seconds of a step by the links that the run of `plan` has measured."""
    recipe = load_recipe(str(bench.recipe), [*FIXED, *WIDER])
    inputs = prepare_inputs(recipe, say=lambda text: None)
    workload = workload_for(recipe, inputs=inputs, compute="float32")
    assert workload is not None, "the sizes of a llama are known"
    links = {name: Link(**plan["measured"]["links"][name]) for name in ("inside", "between")}
    rate = plan["peak_flops_per_second"] / len(os.sched_getaffinity(0))
    hosts = Hosts(count=2, cores=2, flops_per_second=rate, **links)
    candidate = Candidate(layout=layout, micro_batch_samples=4)
    return price(candidate, workload=workload, hosts=hosts, threads=1).step_seconds


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rate", default="20mbit")
    arguments.add_argument("--steps", type=int, default=12)
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    steps = f"train.steps={given.steps}"
    with tempfile.TemporaryDirectory() as name, WorkerPool() as pool:
        folder = Path(name)
        (folder / "lab").mkdir()
        bench = Bench(folder, pool=pool)
        with Lab(2, folder / "lab") as lab:
            cluster = Cluster(lab, folder / "lab")
            for host in cluster.hosts:
                host.rate(given.rate)
            words = ("parallel=auto", *FIXED, *WIDER, steps)
            auto = trained(cluster, bench, *words, out=folder / "auto")
            plan = json.loads((auto.path / "plan.json").read_text())
            print(next(x for x in (folder / "auto.log").read_text().splitlines() if "plan:" in x))
            rows = {str(layout): ((words_of(layout),), layout) for layout in LAYOUTS}
            rows["replicate 4, summed within each host first"] = (GROUPS, None)
            took: dict[str, list[float]] = {what: [] for what in rows}
            for number in range(given.rounds):
                for at, (what, (words, _)) in enumerate(rows.items()):
                    out = folder / f"{number}-{at}"
                    run = trained(cluster, bench, *words, *FIXED, *WIDER, steps, out=out)
                    seconds = [row["step_seconds"] for row in run.rows if "step_seconds" in row]
                    took[what] += seconds[1:]
            print("| layout | predicted s a step | measured s |\n| --- | --- | --- |")
            for what, (_, layout) in rows.items():
                mark = " (auto's choice)" if layout == Layout(**plan["layout"]) else ""
                wanted = f"{predicted(plan, bench, layout):.3f}" if layout is not None else "-"
                print(f"| {what}{mark} | {wanted} | {statistics.median(took[what]):.3f} |")


if __name__ == "__main__":
    main()
