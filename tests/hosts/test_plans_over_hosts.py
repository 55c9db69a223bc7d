"""Two hosts with a slow cable between them: what is planned, what it trains, who is called stuck.

What is measured and planned is printed, for docs/evidence/hosts.md.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hosts.lab import Lab, why_not
from hosts.test_agents_over_hosts import Cluster, worker_of
from tiny import Bench

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why_not()), reason=str(why_not())),
]
SHORT = ("train.steps=8", "train.evaluate_every_steps=4")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("lab")
    with Lab(2, folder) as lab:
        yield Cluster(lab, folder)


def set_rate(cluster: Cluster, rate: str) -> None:
    for host in cluster.hosts:
        host.rate(rate)


def test_auto_measures_the_links_and_trains_one_machines_digits(
    bench: Bench, cluster: Cluster, tmp_path: Path
) -> None:
    set_rate(cluster, "20mbit")
    training = cluster.begin(bench, 2, "parallel=auto", *SHORT, out=tmp_path / "run")
    assert training.process.wait(timeout=240) == 0, training.log.read_text()
    plan = json.loads((training.run.path / "plan.json").read_text())
    took = [row["step_seconds"] for row in training.run.rows if "step_seconds" in row]
    print(f"\n{plan['layout']}: {plan['reason']}; steps took {took[1:]}")
    between = plan["measured"]["links"]["between"]
    # both ways at once: answers wait behind what is sent (0.45 to 0.9 of the rate in five tries)
    assert 2.5e6 * 0.4 < between["bytes_per_second"] < 2.5e6 * 1.1
    assert plan["measured"]["links"]["inside"]["bytes_per_second"] > 1e8
    assert plan["layout"]["replicate"] * plan["layout"]["pipeline"] >= 2, "no tensor across"
    (event,) = training.events("links")
    assert event["between"] == between
    degrees = ", ".join(f"{axis}: {n}" for axis, n in plan["layout"].items())
    micro = f"train.micro_batch_samples={plan['micro_batch_samples']}"
    one_machine = bench.run(f"parallel={{{degrees}}}", micro, *SHORT)
    assert training.run.digits == one_machine.digits
    assert training.run.weights == one_machine.weights


def test_tensor_between_hosts_runs_and_its_price_is_told(
    bench: Bench, cluster: Cluster, tmp_path: Path
) -> None:
    set_rate(cluster, "20mbit")
    words = ("parallel={replicate: 1, tensor: 2}", "train.micro_batch_samples=16", *SHORT)
    training = cluster.begin(bench, 2, *words, out=tmp_path / "run")
    assert training.process.wait(timeout=240) == 0, training.log.read_text()
    log = training.log.read_text()
    assert "warning: tensor 2 lies between hosts and talks in every block: about" in log
    seconds = float(log.partition("talks in every block: about ")[2].partition(" s of a step")[0])
    took = [row["step_seconds"] for row in training.run.rows if "step_seconds" in row]
    print(f"\ntensor between hosts: predicted {seconds} s a step for it, steps took {took[1:]}")
    assert training.run.digits == bench.run(*words).digits


LARGE = (
    "parallel.replicate=2",
    "model.hidden_size=512",
    "model.intermediate_size=1536",
    "model.num_hidden_layers=2",
    "sync={kind: every-step, bucket_bytes: 100000000}",
    "train.steps=2",
    "train.evaluate_every_steps=2",
    "checkpoint.every_steps=2",
)


def test_a_sum_over_a_slow_link_goes_on_and_a_stuck_worker_does_not(
    bench: Bench, cluster: Cluster, tmp_path: Path
) -> None:
    """A step's gradients take longer than a deadlock is waited for without knowing the link."""
    set_rate(cluster, "8mbit")
    training = cluster.begin(bench, 2, *LARGE, out=tmp_path / "run")
    training.until(lambda: training.steps() >= 1, seconds=200)
    row = next(row for row in training.run.rows if "loss" in row)
    print(f"\na step took {row['step_seconds']:.1f} s")
    assert row["step_seconds"] > 22, "longer than 20 s, else nothing is shown"
    time.sleep(5)  # inside the sum of the next step
    assert not training.events("stuck") and not training.events("lost")
    worker = worker_of(cluster.hosts[1])
    began = time.monotonic()
    cluster.hosts[1].run("kill", f"-{int(signal.SIGSTOP)}", str(worker))
    training.until(lambda: training.events("stuck"), seconds=20)
    print(f"a worker that is stopped in a slow sum: found after {time.monotonic() - began:.1f} s")
    (stuck,) = training.events("stuck")
    assert stuck["rank"] == 1 and "is stopped" in stuck["text"]
    set_rate(cluster, "1gbit")
    assert training.process.wait(timeout=240) == 0, training.log.read_text()[-3000:]
    assert training.run.digits == bench.run(*LARGE).digits
