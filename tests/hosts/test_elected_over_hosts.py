"""Coordinators on two of three hosts, with an etcd of three: the host of the leading one is lost.

The seconds are printed, for docs/evidence/hosts.md.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hosts.lab import Host, Lab, why_not
from hosts.test_agents_over_hosts import EXACT, Cluster, Training
from shoal.checkpoint.folders import waiting_name
from shoal.observe.events import read_lines
from tiny import Bench, Run, shoal

REASON = why_not() or (None if shutil.which("etcd") else "etcd is not installed (etcd-server)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(REASON), reason=str(REASON)),
]
WORDS = (*EXACT, "parallel.replicate={min: 1, max: 3}", "train.steps=100000")
WORDS += ("train.evaluate_every_steps=50000", "checkpoint.every_steps=20")


class Elected(Cluster):
    """With an etcd on each host."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        for host in lab.hosts:
            self.start_store(lab, host)
        self.endpoints = ",".join(f"http://{host.address}:2379" for host in lab.hosts)
        super().__init__(lab, folder)

    def start_store(self, lab: Lab, host: Host) -> None:
        peers = ",".join(f"{each.name}=http://{each.address}:2380" for each in lab.hosts)
        client, peer = f"http://{host.address}:2379", f"http://{host.address}:2380"
        words = ["--name", host.name, "--data-dir", "/srv/etcd", "--pre-vote=true"]
        words += ["--listen-client-urls", client, "--advertise-client-urls", client]
        words += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        words += ["--initial-cluster", peers, "--logger", "zap", "--log-level", "panic"]
        host.start("etcd", *words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def coordinator(self, bench: Bench, host: Host, out: Path) -> Training:
        made = Training.__new__(Training)
        made.run, made.log = Run(out), out.with_name(f"{host.name}.log")
        words = ("launch", "hosts", bench.recipe, "--hosts", self.file(3), "--keys", self.keys)
        words += ("--out", out, "--etcd", self.endpoints, "--insecure", *WORDS)
        with made.log.open("w") as log:
            made.process = host.start(*shoal(*words), stdout=log, stderr=subprocess.STDOUT)
        return made


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Elected]:
    with Lab(3, tmp_path) as lab:
        yield Elected(lab, tmp_path)


def steps(out: Path) -> list[int]:
    return [row["step"] for row in read_lines(out / "metrics.jsonl") if "loss" in row]


def begun(cluster: Elected, bench: Bench, out: Path) -> tuple[Training, Training]:
    """Coordinators on the first two hosts: the one that leads, and the one that stands by."""
    both = [cluster.coordinator(bench, host, out) for host in cluster.hosts[:2]]
    both[0].until(lambda: any("leads" in each.log.read_text() for each in both), seconds=400)
    leads = next(each for each in both if "leads" in each.log.read_text())
    leads.until(lambda: leads.events("saved") and len(steps(out)) > 25, seconds=400)
    return leads, both[1] if leads is both[0] else both[0]


def host_of(cluster: Elected, training: Training) -> Host:
    return next(host for host in cluster.hosts if host.name == training.log.stem)


def goes_on(other: Training, out: Path, *, began: float) -> float:
    """Seconds until another coordinator has a step committed, by the workers that were there."""
    other.until(lambda: other.events("adopted"))
    rows = len(read_lines(out / "metrics.jsonl"))
    other.until(lambda: len(read_lines(out / "metrics.jsonl")) > rows)
    assert not other.events("resumed"), "nothing is loaded"
    return time.monotonic() - began


def check_losses(bench: Bench, out: Path) -> None:
    """Every step once, as on one machine."""
    steps_done = steps(out)
    assert steps_done == list(range(1, len(steps_done) + 1))
    last = {row["step"]: row["loss"] for row in Run(out).rows if "loss" in row}
    count = min(max(last), 100)
    clean = bench.train(*WORDS, f"train.stop_after_steps={count}")
    assert [last[step] for step in range(1, count + 1)] == clean.losses


def counted(cluster: Elected, host: Host | None = None, *, seconds: float = 60.0) -> dict[str, Any]:
    """The save that the registry counts, asked from a host (the third one); step 0: none."""
    words = ("etcdctl", "--endpoints", cluster.endpoints, "get", "--prefix", "/shoal/", "-w")
    asked = host or cluster.hosts[2]
    said = json.loads(asked.run(*words, "json", env={"ETCDCTL_API": "3"}, timeout=seconds))
    values = {
        base64.b64decode(each["key"]).decode().rpartition("/")[2]: base64.b64decode(each["value"])
        for each in said.get("kvs", [])
    }
    return dict(json.loads(values["commit"])) if "commit" in values else {"step": 0}


def committed(cluster: Elected) -> int:
    return int(counted(cluster)["step"])


def test_the_coordinators_host_is_switched_off(
    bench: Bench, cluster: Elected, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    leads, other = begun(cluster, bench, out)
    began = time.monotonic()
    host_of(cluster, leads).power_off()
    seconds = goes_on(other, out, began=began)
    print(f"\ncoordinator's host off: {seconds:.2f} s")
    other.until(lambda: committed(cluster) > 20, seconds=60)
    other.stop()
    check_losses(bench, out)
    assert seconds < 20  # 14 are asked of a machine that does nothing else


def test_a_coordinator_that_is_cut_off_is_fenced(
    bench: Bench, cluster: Elected, tmp_path: Path
) -> None:
    """It has a replica and may shrink to it, and goes on with nothing; healed, it stands by."""
    out = tmp_path / "run"
    leads, other = begun(cluster, bench, out)
    began = time.monotonic()
    cluster.lab.cut(host_of(cluster, leads))
    seconds = goes_on(other, out, began=began)
    print(f"\ncoordinator's host cut off: {seconds:.2f} s")
    cluster.lab.heal()
    leads.until(lambda: "no longer the coordinator" in leads.log.read_text(), seconds=60)
    other.until(lambda: other.events("host-back"), seconds=60)
    generations = [each["members"] for each in other.events("generation")]
    assert [0] not in generations, "alone, without the registry's word"
    other.until(lambda: other.events("generation")[-1]["members"] == [0, 1, 2], seconds=60)
    other.stop()
    leads.process.wait(timeout=30)
    check_losses(bench, out)


def test_the_store_is_away_for_a_while(bench: Bench, cluster: Elected, tmp_path: Path) -> None:
    """Training goes on, saves wait to be committed, and are once it is back."""
    out = tmp_path / "run"
    leads, _ = begun(cluster, bench, out)
    leads.until(lambda: committed(cluster) >= 20, seconds=60)
    for host in cluster.hosts[:2]:
        host.run("pkill", "-KILL", "-x", "etcd")
    rows = len(steps(out))
    leads.until(lambda: "registry does not answer" in leads.log.read_text(), seconds=60)
    leads.until(lambda: len(steps(out)) > rows + 5, seconds=60)
    for host in cluster.hosts[:2]:
        cluster.start_store(cluster.lab, host)
    saved = max(int(row["step"]) for row in leads.events("saved"))
    leads.until(lambda: committed(cluster) >= saved, seconds=60)
    leads.stop()
    check_losses(bench, out)


def test_a_host_that_was_stopped_leaves_saves_that_nobody_loads(
    bench: Bench, cluster: Elected, tmp_path: Path
) -> None:
    """The coordinator's, for longer than its lease. What it saves once it runs again is too late.

    A copy of a real save stands for one that its workers end late, with the newest name of all.
    """
    out = tmp_path / "run"
    leads, other = begun(cluster, bench, out)
    host = host_of(cluster, leads)
    old = counted(cluster)
    began = time.monotonic()
    host.freeze()
    print(f"\ncoordinator's host stopped: {goes_on(other, out, began=began):.2f} s")
    time.sleep(20 - min(19.0, time.monotonic() - began))
    host.thaw()
    leads.until(lambda: "no longer the coordinator" in leads.log.read_text(), seconds=60)
    other.until(lambda: committed(cluster) > old["step"], seconds=60)
    assert counted(cluster)["generation"] > old["generation"]
    saves = out / "checkpoints"
    stale = saves / waiting_name(99999, generation=old["generation"])
    shutil.copytree(saves / counted(cluster)["place"], stale)
    other.stop()
    leads.process.wait(timeout=30)
    last = committed(cluster)
    again = cluster.coordinator(bench, cluster.hosts[0], out)
    again.until(lambda: again.events("resumed"))
    assert again.events("resumed")[-1]["step"] == last < 99999
    assert not stale.exists()
    again.until(lambda: committed(cluster) > last, seconds=60)
    again.stop()
    check_losses(bench, out)
