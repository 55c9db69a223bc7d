"""Hosts without shared storage, none of which has all of the state: own boxes and a copy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hosts.lab import Host, why_not
from hosts.test_agents_over_hosts import Cluster
from hosts.test_own_disks_over_hosts import Apart, flip, kill_coordinator, three_apart
from tiny import Bench

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why_not()), reason=str(why_not())),
]
LOCAL = ("checkpoint.where=local", "checkpoint.every_steps=20", "train.evaluate_every_steps=60")
WORDS = (
    *LOCAL,
    "model.num_hidden_layers=3",
    "parallel={replicate: 1, pipeline: 3}",
    "train.global_batch_samples=12",
    "checkpoint.keep_best=false",
    "train.steps=120",
)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with three_apart(tmp_path) as made:
        yield made


def boxes(host: Host) -> list[str]:
    """Of which hosts it has boxes of the newest such step, and whether it has that joined."""
    found = sorted(path.name for path in (host.disk / "run/checkpoints").glob("step-*"))
    last = max(name.partition(".")[0] for name in found)
    return [name.rpartition(".")[2] for name in found if name.startswith(last)]


def num_bytes(host: Host) -> int:
    """Of files, each counted once however many names it has."""
    files = (host.disk / "run/checkpoints").rglob("*.safetensors")
    return sum({stat.st_ino: stat.st_size for stat in (path.stat() for path in files)}.values())


def test_a_stage_on_each_host(bench: Bench, cluster: Cluster, tmp_path: Path) -> None:
    """The model is written at the end from all hosts' boxes, on the host that writes it."""
    training = Apart(cluster, bench, cluster.hosts, *WORDS, log=tmp_path / "run.log")
    training.end()
    one_machine = bench.run(*WORDS)
    assert training.run.losses == one_machine.losses
    assert training.run.weights == one_machine.weights
    h1, h2, h3 = cluster.hosts
    assert boxes(h2) == ["host-0", "host-1"] and boxes(h3) == ["host-1", "host-2"]
    assert boxes(h1) == ["step-00000120", "host-0", "host-1", "host-2"]
    whole = sum(
        path.stat().st_size
        for path in (one_machine.path / "checkpoints/step-00000120").glob("*.safetensors")
    )
    assert num_bytes(h2) < 2 * whole, "of two saves, two thirds each"
    saved = training.events("saved")
    assert [each["step"] for each in saved] == [20, 40, 60, 80, 100, 120]
    assert all(len(each["hosts"]) == 3 for each in saved)


def test_a_host_is_lost_for_good_and_its_stage_goes_on_elsewhere(
    bench: Bench, cluster: Cluster, tmp_path: Path
) -> None:
    """Between two saves; then the coordinator goes too, and starts again on the two."""
    h1, h2, h3 = cluster.hosts
    training = Apart(cluster, bench, cluster.hosts, *WORDS, log=tmp_path / "first.log")
    training.until(lambda: training.events("saved"))
    h2.power_off()
    training.until(lambda: training.events("resumed"))
    resumed = training.events("resumed")[-1]["step"]
    training.until(lambda: any(each["step"] > resumed for each in training.events("saved")))
    assert {tuple(each["hosts"]) for each in training.events("saved")[-1:]} != set()
    kill_coordinator(h1)
    training.process.wait(timeout=10)
    again = Apart(cluster, bench, [h1, h3], *WORDS, "--go-on", log=tmp_path / "again.log")
    again.end()
    one_machine = bench.run(*WORDS)
    assert again.run.losses == one_machine.losses
    assert again.run.weights == one_machine.weights
    assert [row["step"] for row in again.run.rows if "loss" in row] == list(range(1, 121))


def test_boxes_of_which_no_whole_copy_is_left(
    bench: Bench, cluster: Cluster, tmp_path: Path
) -> None:
    """A torn copy is taken from the other one; without that it goes back one save, and says so."""
    training = Apart(cluster, bench, cluster.hosts, *WORDS, log=tmp_path / "first.log")
    training.until(lambda: len(training.events("saved")) > 1)
    training.stop()
    _, h2, h3 = cluster.hosts
    tear(h3, of=1)
    stopped = training.events("saved")[-1]["step"] + 5
    words = (*WORDS, f"train.stop_after_steps={stopped}")
    again = Apart(cluster, bench, cluster.hosts, *words, "--go-on", log=tmp_path / "again.log")
    again.end()
    assert not again.events("save-lost") and again.events("saved")[-1]["step"] == stopped
    tear(h3, of=1)
    tear(h2, of=1)
    last = Apart(cluster, bench, cluster.hosts, *WORDS, "--go-on", log=tmp_path / "last.log")
    last.end()
    (lost,) = last.events("save-lost")
    assert lost["step"] == stopped and "nobody who is there has what h2" in lost["text"]
    resumed = last.events("resumed")[-1]["step"]
    assert resumed < stopped
    one_machine = bench.run(*WORDS)
    assert last.run.losses[-(120 - resumed) :] == one_machine.losses[resumed:]
    assert last.run.weights == one_machine.weights


def tear(host: Host, *, of: int) -> None:
    """One byte of the newest boxes of host number `of` that are on this disk."""
    folder = max((host.disk / "run/checkpoints").glob(f"step-*.host-{of}"))
    flip(next(folder.glob("*.safetensors")), -1)


def test_replicas_that_are_not_alike(bench: Bench, cluster: Cluster, tmp_path: Path) -> None:
    """Each host saves its replica; all are killed, a disk is lost, and the run goes on."""
    words = (
        *LOCAL,
        "parallel.replicate=3",
        "sync={kind: local-sgd, every_steps: 4}",
        "train.global_batch_samples=12",
        "checkpoint.every_steps=10",
        "checkpoint.model=best",
        "train.steps=60",
    )
    training = Apart(cluster, bench, cluster.hosts, *words, log=tmp_path / "first.log")
    training.until(lambda: training.events("saved"))
    training.stop()
    h1, h2, h3 = cluster.hosts
    shutil.rmtree(h2.disk / "run")
    hosts = [h3, h1, h2]
    again = Apart(cluster, bench, hosts, *words, "--go-on", log=tmp_path / "again.log")
    again.end()
    one_machine = bench.run(*words)
    resumed = again.events("resumed")[-1]["step"]
    assert again.run.losses == one_machine.losses[resumed:]
    assert again.run.weights == one_machine.weights
