"""Three hosts that share no storage: each saves on its own disk, and the data comes from a peer."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from hosts.lab import Host, Lab, why_not
from hosts.test_agents_over_hosts import EXACT, Cluster, Training
from tiny import Bench, Run, shoal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why_not()), reason=str(why_not())),
]
CACHE = {"SHOAL_CACHE": "/srv/cache"}
WORDS = (
    *EXACT,
    "parallel.replicate={min: 1, max: 3}",
    "checkpoint.where=local",
    "checkpoint.every_steps=30",
    "checkpoint.keep_best=false",
    "train.steps=200",
    "train.evaluate_every_steps=100",
)


class Apart(Training):
    """A coordinator on the first of `hosts`, where its run folder is, as on each of them."""

    def __init__(
        self, cluster: Cluster, bench: Bench, hosts: Sequence[Host], *words: str, log: Path
    ) -> None:
        self.run, self.log = Run(hosts[0].disk / "run"), log
        listed = log.with_suffix(".hosts")
        listed.write_text("".join(f"{host.address}\n" for host in hosts))
        command = ("launch", "hosts", bench.recipe, "--hosts", listed, "--keys", cluster.keys)
        with log.open("w") as file:
            self.process = hosts[0].start(
                *shoal(*command, "--out", "/srv/run", *words),
                env=CACHE,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def end(self) -> None:
        assert self.process.wait(timeout=200) == 0, self.log.read_text()[-4000:]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Run folder and cache of each host are on its own disk."""
    with Lab(3, tmp_path / "lab") as lab:
        folder = tmp_path / "cluster"
        folder.mkdir()
        yield Cluster(lab, folder, environments={host.name: CACHE for host in lab.hosts})


def saves(host: Host) -> list[str]:
    return sorted(path.name for path in (host.disk / "run/checkpoints").glob("step-*"))


def kill_coordinator(host: Host) -> None:
    inside = int(host.run("pgrep", "-f", "launch hosts").split()[0])
    host.run("kill", "-9", str(inside))


def test_a_host_is_lost_for_good_and_the_others_go_on(
    bench: Bench, cluster: Cluster, tmp_path: Path
) -> None:
    """Between two saves; then the coordinator goes too, and starts again on the two."""
    h1, h2, h3 = cluster.hosts
    training = Apart(cluster, bench, cluster.hosts, *WORDS, log=tmp_path / "first.log")
    training.until(lambda: training.events("saved"))
    assert {each["host"].split()[0] for each in training.events("fetched")} == {"h2", "h3"}
    h3.power_off()
    training.until(lambda: len(training.events("saved")) > 2)
    kill_coordinator(h1)
    training.process.wait(timeout=10)
    print(saves(h1), saves(h2), saves(h3))
    assert saves(h1)[-1] == saves(h2)[-1] > saves(h3)[-1]
    again = Apart(cluster, bench, [h1, h2], *WORDS, "--go-on", log=tmp_path / "again.log")
    again.end()
    one_machine = bench.run(*WORDS)
    assert again.run.losses == one_machine.losses
    assert again.run.weights == one_machine.weights
    assert saves(h1) == saves(h2)
    assert [row["step"] for row in again.run.rows if "loss" in row] == list(range(1, 201))
