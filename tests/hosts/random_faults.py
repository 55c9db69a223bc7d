"""Random schedules of faults upon three hosts with an etcd and a coordinator each.

What holds whatever comes in whatever order: commits of the registry never go back, every step is in
the run's rows once, with the loss of one machine that lost nothing.
"""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hosts.lab import Host
from hosts.test_agents_over_hosts import Training
from hosts.test_elected_over_hosts import WORDS, Elected, counted, steps
from shoal.launch.registry.membership import LEASE_SECONDS
from tiny import Bench, Run

SECONDS = 25.0
"""In which faults begin."""
_AGENTS_FORKS = "pgrep -f shoal.launch.forkserver | head -1"
"""The first fork server of a host is its agent's; a coordinator that begins later has another."""
Act = tuple[float, str, Callable[[], object]]
"""When, after the first steps; what, in words; how."""


class Schedule:
    """One run and what happens to it, by a seed. `play` it."""

    def __init__(self, seed: int, *, bench: Bench, cluster: Elected, folder: Path) -> None:
        self._random, self._bench, self._cluster = random.Random(seed), bench, cluster
        self._out = folder / "run"
        self._hosts, self._lab = cluster.hosts, cluster.lab
        self._frozen: set[str] = set()
        self._coordinators: dict[str, Training] = {}
        self._ended = threading.Event()
        self.commits: list[tuple[int, int]] = []
        """(generation, step) that the registry counted, as it was asked again and again."""
        self.story: list[str] = []

    def play(self) -> None:
        """Raises AssertionError for what does not hold."""
        for host in self._hosts:
            self._coordinate(host)
        watching = threading.Thread(target=self._watch)
        watching.start()
        try:
            self._until(lambda: len(steps(self._out)) > 25, seconds=120)
            began = time.monotonic()
            for at, what, how in sorted(self._acts(), key=lambda act: act[0]):
                time.sleep(max(0.0, began + at - time.monotonic()))
                self.story.append(f"{time.monotonic() - began:.1f} s: {what}")
                how()
            self._mend()
            before = len(steps(self._out))
            self._until(lambda: len(steps(self._out)) > before + 40, seconds=120)
            self._stop()
        finally:
            self._ended.set()
            watching.join()
        self._check()

    # --- what happens

    def _acts(self) -> list[Act]:
        """Three faults, which may overlap; each with what undoes it."""
        acts: list[Act] = []
        for _ in range(3):
            at, lasts = self._random.uniform(0, SECONDS - 10), self._random.uniform(2, 14)
            kind = self._random.choice((self._kill, self._stop_host, self._cut, self._store))
            acts += kind(at, min(lasts, SECONDS - at))
        return acts

    def _kill(self, at: float, lasts: float) -> list[Act]:
        host = self._random.choice(self._hosts)
        if self._random.random() < 0.5:
            return [(at, f"a worker of {host.name} is killed", lambda: self._kill_worker(host))]
        return [
            (at, f"the coordinator on {host.name} is killed", lambda: self._kill_coordinator(host)),
            (at + lasts, f"it is started again on {host.name}", lambda: self._coordinate(host)),
        ]

    def _stop_host(self, at: float, lasts: float) -> list[Act]:
        host = self._random.choice(self._hosts)
        return [
            (at, f"{host.name} is stopped", lambda: self._freeze(host)),
            (at + lasts, f"{host.name} goes on", lambda: self._thaw(host)),
        ]

    def _cut(self, at: float, lasts: float) -> list[Act]:
        one, other = self._random.sample(self._hosts, 2)
        how, what = self._random.choice(
            (
                (lambda: self._lab.cut(one), f"{one.name} is cut off"),
                (lambda: self._lab.cut(one, other), f"{one.name} and {other.name} are cut"),
                (
                    lambda: self._lab.cut_one_way(one, other),
                    f"{one.name} to {other.name} is cut, one way",
                ),
                (lambda: self._lab.lose(one, 0.01), f"{one.name} loses a frame of 100"),
            )
        )
        return [(at, what, how), (at + lasts, "all cables are whole", self._lab.heal)]

    def _store(self, at: float, lasts: float) -> list[Act]:
        gone = self._random.sample(self._hosts, self._random.choice((1, 2)))
        names = " and ".join(host.name for host in gone)
        return [
            (at, f"the store of {names} is killed", lambda: self._kill_stores(gone)),
            (at + lasts, f"it is started again on {names}", self._start_stores),
        ]

    def _kill_worker(self, host: Host) -> None:
        if host.name not in self._frozen:
            host.run("bash", "-c", f"pkill -KILL -P $({_AGENTS_FORKS}) || true")

    def _kill_coordinator(self, host: Host) -> None:
        if host.name not in self._frozen:
            host.run("bash", "-c", "pkill -KILL -f '[l]aunch hosts' || true")

    def _kill_stores(self, hosts: list[Host]) -> None:
        for host in hosts:
            if host.name not in self._frozen:
                host.run("bash", "-c", "pkill -KILL -x etcd || true")

    def _start_stores(self) -> None:
        for host in self._hosts:
            if host.name not in self._frozen:
                running = host.run("bash", "-c", "pgrep -c -x etcd || true").strip()
                if running == "0":
                    self._cluster.start_store(self._lab, host)

    def _freeze(self, host: Host) -> None:
        self._frozen.add(host.name)
        host.freeze()

    def _thaw(self, host: Host) -> None:
        self._frozen.discard(host.name)
        host.thaw()

    def _coordinate(self, host: Host) -> None:
        """Start a coordinator there, unless there is one."""
        known = self._coordinators.get(host.name)
        if host.name not in self._frozen and (known is None or known.process.poll() is not None):
            made = self._cluster.coordinator(self._bench, host, self._out)
            self._coordinators[host.name] = made

    # --- the end

    def _mend(self) -> None:
        """Undo what is left, and let coordinators that have ended stand by again."""
        for host in self._hosts:
            if host.name in self._frozen:
                self._thaw(host)
        self._lab.heal()
        self._start_stores()
        time.sleep(LEASE_SECONDS)
        for host in self._hosts:
            self._coordinate(host)

    def _stop(self) -> None:
        (self._out / "STOP").touch()
        for each in self._coordinators.values():
            try:
                status = each.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                raise AssertionError(f"does not stop:\n{self._told()}") from None
            assert status == 75, self._told()

    def _until(self, true: Callable[[], object], *, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, self._told()
            time.sleep(0.1)

    def _told(self) -> str:
        logs = {name: each.log.read_text()[-2500:] for name, each in self._coordinators.items()}
        told = "".join(f"\n--- {name}\n{text}" for name, text in logs.items())
        return "\n".join(self.story) + told

    def _watch(self) -> None:
        """Ask any store that answers what counts, again and again."""
        while not self._ended.wait(1.0):
            for host in self._hosts:
                try:
                    found: dict[str, Any] = counted(self._cluster, host, seconds=2)
                except (AssertionError, subprocess.TimeoutExpired):
                    continue
                if found["step"]:
                    self.commits.append((int(found["generation"]), int(found["step"])))
                break

    def _check(self) -> None:
        assert self.commits == sorted(self.commits), f"{self.commits}\n{self._told()}"
        assert len(set(self.commits)) > 1, self._told()
        done = steps(self._out)
        assert done == list(range(1, len(done) + 1)), self._told()
        losses = [row["loss"] for row in Run(self._out).rows if "loss" in row]
        clean = self._bench.train(*WORDS, f"train.stop_after_steps={len(done)}")
        assert losses == clean.losses, self._told()
