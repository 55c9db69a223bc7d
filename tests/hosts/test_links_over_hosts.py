"""Links between hosts that all reach the coordinator: cut, cut in one direction, slow and lossy.

The seconds are printed, for docs/evidence/hosts.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hosts.lab import Host, Lab, skewed, why_not
from hosts.test_agents_over_hosts import SHRINKS, Cluster, Training
from tiny import Bench

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why_not()), reason=str(why_not())),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("lab")
    with Lab(3, folder) as lab:
        yield Cluster(lab, folder)


def test_hosts_that_do_not_reach_each_other_are_refused_at_the_start(
    bench: Bench, cluster: Cluster, tmp_path: Path
) -> None:
    _, h2, h3 = cluster.hosts
    cluster.lab.cut_one_way(h3, h2)
    try:
        training = cluster.begin(bench, 3, *SHRINKS, out=tmp_path / "run")
        assert training.process.wait(timeout=240) == 2
    finally:
        cluster.lab.heal()
    said = " ".join(training.log.read_text().split())
    assert "hosts do not reach each other, though this process reaches them:" in said
    assert f"h2 ({h2.address}:27465) and h3 ({h3.address}:27465) workers connect" in said


def test_a_firewall_that_lets_only_agents_through_is_found_at_the_start(
    bench: Bench, cluster: Cluster, tmp_path: Path
) -> None:
    _, h2, h3 = cluster.hosts
    cluster.lab.refuse(h2, h3, but=27465)
    try:
        training = cluster.begin(bench, 3, *SHRINKS, out=tmp_path / "run")
        assert training.process.wait(timeout=240) == 2
    finally:
        cluster.lab.heal()
    assert f"h2 ({h2.address}:27465) and h3" in " ".join(training.log.read_text().split())


def left_out(training: Training, cut: Callable[[], object]) -> float:
    """Seconds from a cut to the next committed step without the host that is left out."""
    before = len(training.events("recovered"))
    seconds = training.lose(cut, event="left-out")
    training.until(lambda: len(training.events("recovered")) > before)
    return seconds


def taken_back(training: Training, heal: Callable[[], object]) -> None:
    generations = len(training.events("generation"))
    heal()
    training.until(lambda: training.events("host-back"))
    training.until(lambda: len(training.events("generation")) > generations)
    assert training.events("generation")[-1]["members"] == [0, 1, 2]
    steps = training.steps()
    training.until(lambda: training.steps() > steps + 2)


@pytest.mark.parametrize("one_way", [False, True])
def test_two_hosts_do_not_reach_each_other(
    bench: Bench, cluster: Cluster, tmp_path: Path, one_way: bool
) -> None:
    """Both reach the coordinator: the last of them is left out until the cable is whole again."""
    _, h2, h3 = cluster.hosts
    cut = cluster.lab.cut_one_way if one_way else cluster.lab.cut
    training = cluster.begin(bench, 3, *SHRINKS, out=tmp_path / "run")
    seconds = left_out(training, lambda: cut(h2, h3))
    print(f"\nh2 and h3 cut{' in one direction' if one_way else ''}: {seconds:.2f} s")
    (event,) = training.events("left-out")
    assert event["hosts"] == [f"host h3 ({h3.address}:27465)"]
    assert "host h2" in event["text"] and "do not reach each other" in event["text"]
    assert training.events("generation")[-1]["members"] == [0, 1]
    taken_back(training, cluster.lab.heal)
    training.stop()
    training.check_steps(bench, *SHRINKS)
    assert not training.events("stuck"), "nobody is ended who is whole"
    assert seconds < 14


def test_a_host_is_stopped_for_a_while(bench: Bench, cluster: Cluster, tmp_path: Path) -> None:
    """Agent and workers, for longer than the lease: the others go on, and it is taken in again."""
    host = cluster.hosts[2]
    training = cluster.begin(bench, 3, *SHRINKS, out=tmp_path / "run")
    began = time.monotonic()
    seconds = training.lose(host.freeze)
    print(f"\nhost stopped: {seconds:.2f} s")
    time.sleep(max(0.0, 20 - (time.monotonic() - began)))
    taken_back(training, host.thaw)
    training.stop()
    training.check_steps(bench, *SHRINKS)
    assert seconds < 12


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The clocks of two hosts are wrong by 10 minutes, in both directions."""
    folder = tmp_path_factory.mktemp("uneven")
    with Lab(3, folder) as lab:
        clocks = {"h2": skewed(folder, 600.0), "h3": skewed(folder, -600.0)}
        yield Cluster(lab, folder, environments=clocks)


CONNECT = (
    "import socket, sys, time; began = time.monotonic(); "
    "socket.create_connection((sys.argv[1], 27465)); print(time.monotonic() - began)"
)


def round_trip(host: Host, other: Host) -> float:
    """Seconds in which a connection comes about."""
    return float(host.run(sys.executable, "-c", CONNECT, other.address))


WHOLE = ("parallel.replicate=3", "train.global_batch_samples=12")


def check_whole_training(bench: Bench, cluster: Cluster, out: Path) -> float:
    """Trains to its end, to the bits of one machine; seconds."""
    began = time.monotonic()
    training = cluster.begin(bench, 3, *WHOLE, out=out)
    assert training.process.wait(timeout=240) == 0, training.log.read_text()
    seconds = time.monotonic() - began
    one_machine = bench.run(*WHOLE)
    assert training.run.digits == one_machine.digits
    assert training.run.weights == one_machine.weights
    assert not training.events("lost") and not training.events("left-out")
    return seconds


def test_clocks_that_are_wrong(bench: Bench, uneven: Cluster, tmp_path: Path) -> None:
    date = float(uneven.hosts[1].run("date", "+%s", env=skewed(uneven.folder, 600.0)))
    assert date - time.time() > 590, "clocks can be set wrong here"
    seconds = check_whole_training(bench, uneven, tmp_path / "run")
    print(f"\nclocks wrong by 600 s: whole training in {seconds:.1f} s")


def test_cables_that_are_slow_and_lose_frames(
    bench: Bench, uneven: Cluster, tmp_path: Path
) -> None:
    """20 ms each way and 1 % of frames lost, at two of three hosts; and the clocks are wrong."""
    for host in uneven.hosts[1:]:
        uneven.lab.delay(host, 0.02)
        uneven.lab.lose(host, 0.01)
    seconds = check_whole_training(bench, uneven, tmp_path / "run")
    print(f"\n20 ms and 1 % loss: whole training in {seconds:.1f} s")
    assert round_trip(uneven.hosts[1], uneven.hosts[2]) > 0.07, "two cables, there and back"


LARGER = ("model.hidden_size=128", "model.intermediate_size=512", "sync.shares=measured")


def test_a_slow_host_gets_a_smaller_share(bench: Bench, cluster: Cluster, tmp_path: Path) -> None:
    """Of whole micro batches, to the same bits."""
    words = (*SHRINKS, *LARGER)
    training = cluster.begin(bench, 3, *words, out=tmp_path / "run")
    training.until(lambda: training.steps() > 5)
    cluster.hosts[2].use_cores(0.1)

    def shares() -> list[float]:
        return training.events("shares")[-1]["shares"] if training.events("shares") else []

    seconds = training.until(lambda: shares() and shares()[2] == min(shares()) < 0.2)
    cluster.hosts[2].use_cores(2.0)
    steps = training.steps()
    training.until(lambda: training.steps() > steps + 2)
    print(f"\na host with a tenth of a core: {shares()} after {seconds:.1f} s, step {steps}")
    training.stop()
    training.check_steps(bench, *words, most=steps + 3)  # what follows is as every other run
