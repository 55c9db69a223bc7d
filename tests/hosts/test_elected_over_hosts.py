"""Coordinators on two of three hosts, with an etcd of three: the host of the leading one is lost.

The seconds are printed, for docs/evidence/hosts.md.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hosts.lab import Host, Lab, why_not
from hosts.test_agents_over_hosts import EXACT, Cluster, Training
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


def test_the_coordinators_host_is_switched_off(
    bench: Bench, cluster: Elected, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    both = [cluster.coordinator(bench, host, out) for host in cluster.hosts[:2]]
    leads = both[0]
    leads.until(lambda: any("leads" in each.log.read_text() for each in both))
    if "leads" not in both[0].log.read_text():
        leads = both[1]
    other = both[1] if leads is both[0] else both[0]
    leads.until(lambda: leads.events("saved") and len(steps(out)) > 25)
    host = cluster.hosts[both.index(leads)]
    before = len(read_lines(out / "metrics.jsonl"))
    began = time.monotonic()
    host.power_off()
    quiet = len(read_lines(out / "metrics.jsonl"))
    other.until(lambda: other.events("resumed"))
    other.until(lambda: len(read_lines(out / "metrics.jsonl")) > quiet + 1)
    print(f"\ncoordinator's host off: {time.monotonic() - began:.2f} s ({before} rows before)")
    other.stop()
    clean = bench.train(*WORDS, "train.stop_after_steps=60")
    last = {row["step"]: row["loss"] for row in Run(out).rows if "loss" in row}
    assert [last[step] for step in range(1, 61)] == clean.losses
