"""A run over the agents of three hosts: its digits, and what the loss of a host costs.

The seconds of losses are printed, for docs/evidence/hosts.md.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from hosts.lab import Host, Lab, why_not
from shoal.observe.events import read_lines
from tiny import Bench, Run, shoal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why_not()), reason=str(why_not())),
]
LONG = ("train.steps=100000", "train.evaluate_every_steps=50000", "checkpoint.every_steps=50000")


class Cluster:
    """Three hosts with an agent each; coordinators run on the first."""

    def __init__(
        self, lab: Lab, folder: Path, *, environments: Mapping[str, Mapping[str, str]] | None = None
    ) -> None:
        """`environments`: of the agents, by host."""
        self.lab, self.folder, self.hosts = lab, folder, lab.hosts
        self._environments = environments or {}
        self.agents: dict[str, subprocess.Popen[str]] = {}
        self.keys = folder / "keys"
        for host in self.hosts:
            self.start_agent(host)

    def start_agent(self, host: Host, *more: str) -> None:
        words = shoal("agent", "--listen", host.address, "--keys", self.keys, *more)
        with (self.folder / f"{host.name}.log").open("a") as log:
            self.agents[host.name] = host.start(
                *words,
                env=self._environments.get(host.name),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def file(self, count: int) -> Path:
        path = self.folder / f"hosts-{count}"
        path.write_text("".join(f"{host.address}\n" for host in self.hosts[:count]))
        return path

    def begin(self, bench: Bench, count: int, *overrides: str, out: Path) -> Training:
        return Training(self, bench, count, *overrides, out=out)


class Training:
    """A coordinator on the first host, and the run that it writes."""

    def __init__(
        self, cluster: Cluster, bench: Bench, count: int, *overrides: str, out: Path
    ) -> None:
        self.run, self.log = Run(out), out.with_suffix(".log")
        words = ("launch", "hosts", bench.recipe, "--hosts", cluster.file(count))
        words += ("--keys", cluster.keys, "--out", out, *overrides)
        with self.log.open("w") as log:
            self.process = cluster.hosts[0].start(
                *shoal(*words), stdout=log, stderr=subprocess.STDOUT
            )

    def until(self, true: Callable[[], object], *, seconds: float = 400.0) -> float:
        began = time.monotonic()
        while not true():
            assert time.monotonic() - began < seconds, self.log.read_text()[-3000:]
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.02)
        return time.monotonic() - began

    def steps(self) -> int:
        return sum("loss" in row for row in read_lines(self.run.path / "metrics.jsonl"))

    def events(self, name: str) -> list[dict[str, Any]]:
        found = read_lines(self.run.path / "events.jsonl")
        return [row for row in found if row["event"] == name]

    def lose(self, how: Callable[[], object], *, event: str = "lost") -> float:
        """Seconds from a loss to the next step that is committed after it was noticed."""
        self.until(lambda: self.steps() > 5)
        before = len(self.events(event))
        began = time.monotonic()
        how()
        self.until(lambda: len(self.events(event)) > before)
        steps = self.steps()
        self.until(lambda: self.steps() > steps)
        return time.monotonic() - began

    def stop(self) -> None:
        (self.run.path / "STOP").touch()
        try:
            assert self.process.wait(timeout=60) == 75, self.log.read_text()[-3000:]
        except subprocess.TimeoutExpired:
            raise AssertionError(self.log.read_text()[-6000:]) from None

    def check_steps(self, bench: Bench, *overrides: str, most: int = 300) -> None:
        """Every step once, and the losses of one machine, by as many as one trains quickly."""
        steps = [row["step"] for row in self.run.rows if "loss" in row]
        assert steps == list(range(1, len(steps) + 1))
        count = min(len(steps), most)
        clean = bench.train(*overrides, f"train.stop_after_steps={count}")
        assert self.run.losses[:count] == clean.losses


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("lab")
    with Lab(3, folder) as lab:
        yield Cluster(lab, folder)


@pytest.mark.parametrize("count", [2, 3])
def test_digits_are_those_of_one_machine(
    bench: Bench, cluster: Cluster, count: int, tmp_path: Path
) -> None:
    words = (f"parallel.replicate={count}", "train.global_batch_samples=12", "train.steps=8")
    training = cluster.begin(bench, count, *words, out=tmp_path / "run")
    assert training.process.wait(timeout=240) == 0, training.log.read_text()
    one_machine = bench.run(*words)
    assert training.run.digits == one_machine.digits
    assert training.run.weights == one_machine.weights


EXACT = ("train.exact=true", "train.global_batch_samples=12", "train.micro_batch_samples=1")
SHRINKS = (*EXACT, "parallel.replicate={min: 1, max: 3}", *LONG)


def worker_of(host: Host) -> int:
    """A worker of a host, by its number among all processes."""
    (first,) = host.run("pgrep", "-f", "shoal.launch.forkserver").split()[:1]
    (worker, *_) = host.run("pgrep", "-P", first).split()
    return int(worker)


def test_a_worker_is_killed(bench: Bench, cluster: Cluster, tmp_path: Path) -> None:
    training = cluster.begin(bench, 3, *SHRINKS, out=tmp_path / "run")
    training.until(lambda: training.steps() > 5)
    worker = worker_of(cluster.hosts[1])
    seconds = training.lose(lambda: cluster.hosts[1].run("kill", "-9", str(worker)))
    print(f"\nworker killed: {seconds:.2f} s")
    training.stop()
    training.check_steps(bench, *SHRINKS)
    assert seconds < 3


def test_a_host_is_switched_off_and_comes_back(
    bench: Bench, cluster: Cluster, tmp_path: Path
) -> None:
    host = cluster.hosts[2]
    training = cluster.begin(bench, 3, *SHRINKS, out=tmp_path / "run")
    seconds = training.lose(host.power_off)
    print(f"\nhost off in silence: {seconds:.2f} s")
    host.boot()
    cluster.start_agent(host)
    training.until(lambda: training.events("host-back"))
    generations = len(training.events("generation"))
    back = training.until(lambda: len(training.events("generation")) > generations)
    print(f"taken in {back:.2f} s after its agent answered")
    assert training.events("generation")[-1]["members"] == [0, 1, 2]
    steps = training.steps()
    training.until(lambda: training.steps() > steps + 2)
    training.stop()
    training.check_steps(bench, *SHRINKS)
    assert seconds < 12


def test_a_host_is_cut_off_and_healed(bench: Bench, cluster: Cluster, tmp_path: Path) -> None:
    """Its workers live on and wait; once it hears nothing for a lease its agent ends them."""
    training = cluster.begin(bench, 3, *SHRINKS, out=tmp_path / "run")
    seconds = training.lose(lambda: cluster.lab.cut(cluster.hosts[1]))
    print(f"\nhost cut off: {seconds:.2f} s")
    time.sleep(3)
    cluster.lab.heal()
    training.until(lambda: training.events("host-back"))
    generations = len(training.events("generation"))
    training.until(lambda: len(training.events("generation")) > generations)
    training.stop()
    training.check_steps(bench, *SHRINKS)
    assert seconds < 12


def test_without_room_to_shrink_its_replica_goes_elsewhere(
    bench: Bench, cluster: Cluster, tmp_path: Path
) -> None:
    words = (*EXACT, "parallel.replicate=2", *LONG)
    training = cluster.begin(bench, 2, *words, out=tmp_path / "run")
    host = cluster.hosts[1]
    seconds = training.lose(host.power_off)
    print(f"\nhost off, its replica begins on another: {seconds:.2f} s")
    training.stop()
    training.check_steps(bench, *words)
    host.boot()
    cluster.start_agent(host)
    assert seconds < 14


def test_a_run_folder_that_a_host_does_not_see(bench: Bench, cluster: Cluster) -> None:
    """On its own disk: refused before anything starts, and nobody trains alone."""
    training = cluster.begin(bench, 2, "parallel.replicate=2", out=Path("/srv/run"))
    assert training.process.wait(timeout=60) == 2


def test_a_coordinator_that_dies_takes_its_workers_with_it(
    bench: Bench, cluster: Cluster, tmp_path: Path
) -> None:
    """And the same command goes on from the last save."""
    words = (*EXACT, "parallel.replicate=3", "train.steps=100000", "checkpoint.every_steps=20")
    words += ("train.evaluate_every_steps=50000",)
    training = cluster.begin(bench, 3, *words, out=tmp_path / "run")
    training.until(lambda: training.events("saved"))
    inside = int(cluster.hosts[0].run("pgrep", "-f", "launch hosts").split()[0])
    cluster.hosts[0].run("kill", "-9", str(inside))
    training.process.wait(timeout=10)
    again = cluster.begin(bench, 3, *words, "--go-on", out=tmp_path / "run")
    steps = training.steps()
    again.until(lambda: again.steps() > steps + 10)
    assert again.process.poll() is None, "it goes on"
    again.stop()
