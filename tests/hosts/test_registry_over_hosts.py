"""The registry in an etcd of three hosts: they fall silent, are cut off, and the store is away.

What counts is read from etcd's own history at the end: generations count up, and every save is of
the generation that was the last one when it was committed.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hosts.lab import Host, Lab, skewed, why_not
from unit.launch.test_registry import assert_in_order, history

REASON = why_not() or (None if shutil.which("etcd") else "etcd is not installed (etcd-server)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(REASON), reason=str(REASON)),
]
MEMBER = Path(__file__).parent / "member.py"


class Heard:
    """What a member has printed so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.lines = process, list[dict[str, Any]]()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(json.loads(line))

    def of(self, what: str, *, after: float = 0.0) -> list[dict[str, Any]]:
        return [each for each in list(self.lines) if each["what"] == what and each["at"] > after]


class Cluster:
    """Three hosts, each with an etcd and a member."""

    def __init__(self, lab: Lab, tmp_path: Path) -> None:
        self.lab, self.tmp_path = lab, tmp_path
        self.hosts = lab.hosts
        self.endpoints = [f"http://{each.address}:2379" for each in self.hosts]
        self.members: dict[str, Heard] = {}

    def start_store(self, host: Host) -> None:
        peers = ",".join(f"{each.name}=http://{each.address}:2380" for each in self.hosts)
        client, peer = f"http://{host.address}:2379", f"http://{host.address}:2380"
        words = ["--name", host.name, "--data-dir", "/srv/etcd", "--pre-vote=true"]
        words += ["--listen-client-urls", client, "--advertise-client-urls", client]
        words += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        words += ["--initial-cluster", peers, "--logger", "zap", "--log-level", "panic"]
        host.start("etcd", *words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def start_member(self, host: Host, **more: Any) -> Heard:
        near = [f"http://{host.address}:2379"]  # its own first
        others = [each for each in self.endpoints if each not in near]
        process = host.start(
            sys.executable, MEMBER, host.name, *near, *others, stdout=subprocess.PIPE, **more
        )
        self.members[host.name] = Heard(process)
        return self.members[host.name]

    def begin(self, skew: float = 0.0) -> None:
        for host in self.hosts:
            self.start_store(host)
        for host in self.hosts:
            env = skewed(self.tmp_path, skew) if skew and host is self.hosts[2] else {}
            self.start_member(host, env=env)
        self.until(lambda: self.size_of_generation() == 3, seconds=25)

    def size_of_generation(self) -> int:
        said = [each for heard in self.members.values() for each in heard.of("generation")]
        return len(max(said, key=lambda each: int(each["number"]))["hosts"]) if said else 0

    def coordinator(self) -> Host:
        said = {
            name: max((each["at"] for each in heard.of("commit")), default=0.0)
            for name, heard in self.members.items()
        }
        name = max(said, key=lambda each: said[each])
        return next(host for host in self.hosts if host.name == name)

    def commits(self, *hosts: Host, after: float = 0.0) -> list[dict[str, Any]]:
        return [e for host in hosts for e in self.members[host.name].of("commit", after=after)]

    def until(self, true: Callable[[], bool], *, seconds: float) -> float:
        """Wait until it is; how long that took."""
        began = time.monotonic()
        while not true():
            assert time.monotonic() - began < seconds, {
                name: heard.lines[-3:] for name, heard in self.members.items()
            }
            time.sleep(0.05)
        return time.monotonic() - began

    def leader_of_store(self) -> Host:
        for host in self.hosts:
            words = ("etcdctl", "--endpoints", f"http://{host.address}:2379", "endpoint", "status")
            said = json.loads(host.run(*words, "-w", "json", env={"ETCDCTL_API": "3"}))
            status = said[0]["Status"]
            if status["header"]["member_id"] == status["leader"]:
                return host
        raise AssertionError("no leader")

    def check_history(self, *, but: Host | None = None) -> None:
        """By a host that is on, and whose store is."""
        host = next(each for each in self.hosts if each.pid and each is not but)
        log = history(f"http://{host.address}:2379", "/shoal/lab/", within=host.start)
        assert sum(key == "commit" for key, _ in log) > 10
        assert_in_order(log)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Lab(3, tmp_path) as lab:
        yield Cluster(lab, tmp_path)


@pytest.mark.parametrize("skew", [0.0, -600.0])
def test_the_coordinators_host_falls_silent(cluster: Cluster, skew: float) -> None:
    """Another goes on within 14 s (a lease of 6 s), whatever the clock of a host says."""
    cluster.begin(skew)
    gone = cluster.coordinator()
    others = [each for each in cluster.hosts if each is not gone]
    at = time.monotonic()
    gone.power_off()
    assert cluster.until(lambda: bool(cluster.commits(*others, after=at)), seconds=20) < 14
    assert cluster.size_of_generation() == 2
    cluster.check_history()


def test_a_coordinator_that_is_cut_off_commits_nothing(cluster: Cluster) -> None:
    cluster.begin()
    alone = cluster.coordinator()
    others = [each for each in cluster.hosts if each is not alone]
    cluster.lab.cut(alone)
    at = time.monotonic()
    cluster.until(lambda: bool(cluster.commits(*others, after=at)), seconds=20)
    time.sleep(4)
    assert len(cluster.commits(alone, after=at + 0.5)) == 0
    heard = cluster.members[alone.name]
    assert heard.of("store away", after=at)
    healed = time.monotonic()
    cluster.lab.heal()
    cluster.until(lambda: bool(heard.of("enrolled", after=healed)), seconds=15)
    cluster.until(lambda: cluster.size_of_generation() == 3, seconds=10)
    assert cluster.coordinator() is not alone
    cluster.check_history()


def test_a_coordinator_that_was_stopped_is_fenced(cluster: Cluster) -> None:
    """SIGSTOP for longer than its lease: what it goes on with does not count."""
    cluster.begin()
    paused = cluster.coordinator()
    heard = cluster.members[paused.name]
    others = [each for each in cluster.hosts if each is not paused]
    at = time.monotonic()
    paused.run("pkill", "-STOP", "-f", MEMBER.name)
    cluster.until(lambda: bool(cluster.commits(*others, after=at)), seconds=20)
    back = time.monotonic()
    paused.run("pkill", f"-{signal.SIGCONT.name[3:]}", "-f", MEMBER.name)
    cluster.until(
        lambda: bool(heard.of("fenced", after=back) or heard.of("lease ended", after=back)),
        seconds=15,
    )
    assert not cluster.commits(paused, after=back)
    cluster.check_history()


def test_the_stores_leader_goes(cluster: Cluster) -> None:
    """Nothing but a pause: the same coordinator goes on where its own host stays."""
    cluster.begin()
    gone, leading = cluster.leader_of_store(), cluster.coordinator()
    gone.run("pkill", "-KILL", "-x", "etcd")
    at = time.monotonic()
    assert cluster.until(lambda: bool(cluster.commits(leading, after=at)), seconds=20) < 10
    cluster.check_history(but=gone)


def test_the_store_is_away_for_a_while(cluster: Cluster) -> None:
    """Its majority is off for 10 s: nobody can commit, nobody goes, and then they go on."""
    cluster.begin()
    off = [each for each in cluster.hosts if each is not cluster.coordinator()]
    for host in off:
        host.run("pkill", "-KILL", "-x", "etcd")
    at = time.monotonic()
    time.sleep(10)
    assert not cluster.commits(*cluster.hosts, after=at + 1)
    assert all(heard.process.poll() is None for heard in cluster.members.values())
    back = time.monotonic()
    for host in off:
        cluster.start_store(host)
    cluster.until(lambda: bool(cluster.commits(*cluster.hosts, after=back)), seconds=25)
    cluster.check_history()


def test_one_direction_is_cut(cluster: Cluster) -> None:
    """The coordinator hears the others and they do not hear it: it is as good as cut off."""
    cluster.begin()
    mute = cluster.coordinator()
    others = [each for each in cluster.hosts if each is not mute]
    at = time.monotonic()
    for other in others:
        cluster.lab.cut_one_way(mute, other)
    cluster.until(lambda: bool(cluster.commits(*others, after=at)), seconds=25)
    cluster.lab.heal()
    healed = time.monotonic()
    cluster.until(lambda: bool(cluster.members[mute.name].of("enrolled", after=healed)), seconds=15)
    cluster.check_history()
