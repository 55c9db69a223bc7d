"""No history of faults lets a generation go on from a save that the registry does not count.

Coordinators come, go and lie low over a store whose answers get lost (test_registry.Faults); here
each has real folders below it, in which workers of any generation leave saves at any time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule, run_state_machine_as_test

from shoal.checkpoint.folders import published_name, published_steps
from shoal.errors import ShoalError
from shoal.launch.registry.membership import Fenced, Membership
from shoal.launch.registry.registered import Registered
from shoal.launch.registry.store import Unknown, Unreachable
from unit.launch.test_registry import HISTORIES, HOSTS, Faults, facts, one_of
from unit.launch.test_standby import leave, waiting_name


class AtOnce(Executor):
    """Does what it is given before it returns."""

    def submit(self, function: Callable[..., Any], /, *given: Any, **more: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(function(*given, **more))
        except ShoalError as error:
            done.set_exception(error)
        return done


class Saves(Faults):
    """What workers load when a generation begins is what the registry counted last."""

    @initialize()
    def begin(self) -> None:
        super().begin()
        self.folder = tempfile.TemporaryDirectory()
        self.run = Path(self.folder.name)
        self.checkpoints = self.run / "checkpoints"
        self.led = {name: self.coordinator(name) for name in HOSTS}
        self.begun = 0
        self.takes_over("h1")

    def coordinator(self, name: str) -> Registered:
        return Registered(
            self.hosts[name],
            term=lambda: self.terms.get(name),
            deposed=lambda: None,
            run=self.run,
            say=lambda text: None,
            executor=AtOnce(),
        )

    @rule(name=one_of)
    def takes_over(self, name: str) -> None:
        """Another process there, once the one that led has been silent for long."""
        self.hosts[name] = Membership(self.links[name], facts(name))
        self.led[name] = self.coordinator(name)
        self.terms.pop(name, None)
        self.time_passes(7.0)
        self.enrol(name)
        self.lead(name)
        self.recover(name)
        self.announce(name)

    @rule(name=one_of)
    def announce(self, name: str, fresh: bool = True) -> None:
        if name not in self.terms:
            return
        with suppress(ShoalError):
            self.led[name].announce([name], meet="tcp://10.0.0.1:1")
            self.check_what_is_loaded(self.led[name].number)

    def check_what_is_loaded(self, number: int) -> None:
        """As a worker chooses it: the newest folder with the name of a checkpoint."""
        steps, commit = published_steps(self.checkpoints), self.counted()
        assert bool(steps) == bool(commit), (steps, commit)
        if commit is not None:
            loaded = (self.checkpoints / published_name(steps[-1]) / "manifest.json").read_text()
            assert loaded == f"{commit.generation} {commit.step}"
            assert commit.generation < number
        self.begun = max(self.begun, steps[-1] if steps else 0)

    def counted(self) -> Any:
        return Membership(self.written, facts("h9")).look().commit

    @rule(name=one_of, steps=st.integers(1, 3), heard=st.booleans())
    def save(self, name: str, steps: int, heard: bool) -> None:
        """Workers of the generation that this coordinator announced last, old as it may be.

        `heard`: whether it comes to know of it.
        """
        number, step = self.led[name].number, self.begun + steps
        if not number:
            return
        if not (self.checkpoints / waiting_name(step, generation=number)).exists():
            leave(self.checkpoints, step, number)
        if heard:
            self.led[name].saved(step, generation=number, keep=2, best=None)
        self.goes_on(name)

    @rule(name=one_of)
    def goes_on(self, name: str) -> None:
        with suppress(Fenced):
            self.led[name].look()

    @rule(name=one_of, back=st.integers(0, 2))
    def commit(self, name: str, back: int) -> None:
        """Not past the coordinators."""

    @rule(name=one_of)
    def recover(self, name: str) -> None:
        with suppress(Unreachable, Unknown):
            self.led[name].recover()

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()
        super().teardown()


@pytest.mark.parametrize("histories", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_no_history_loads_what_is_not_committed(histories: int) -> None:
    run_state_machine_as_test(Saves, settings=settings(HISTORIES, max_examples=histories))
