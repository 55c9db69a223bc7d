"""Coordinators that stand by, and what one writes down: over a store in memory that can be away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from shoal.checkpoint.files import Files
from shoal.checkpoint.folders import publish, waiting_name
from shoal.errors import RunError, Stopped, WorkerError
from shoal.launch.cluster import NotYet
from shoal.launch.registry import registered as module
from shoal.launch.registry.etcd import Etcd
from shoal.launch.registry.membership import Fenced, Membership
from shoal.launch.registry.records import HostFacts, Spec
from shoal.launch.registry.registered import Registered
from shoal.launch.registry.standby import Candidate
from shoal.launch.registry.store import Compare, Entry, Memory, Store, Unknown, Unreachable

SPEC = Spec(shoal="1", torch="2", code="c", recipe="r", data="d", run="/runs/a")


class Away(Memory):
    """A store that can be away."""

    away = False

    def read(self) -> dict[str, Entry]:
        if self.away:
            raise Unreachable("nobody answers")
        return super().read()

    def change(
        self,
        put: Mapping[str, bytes],
        *,
        when: Sequence[Compare] = (),
        delete: Sequence[str] = (),
        lease: int | None = None,
    ) -> int | None:
        if self.away:
            raise Unknown("no answer")
        return super().change(put, when=when, delete=delete, lease=lease)

    def keep(self, lease: int) -> bool:
        if self.away:
            raise Unreachable("nobody answers")
        return super().keep(lease)


def membership(store: Store, name: str, **more: Any) -> Membership:
    facts = HostFacts(host=f"{name}-1", name=name, address="", port=0, cores=1)
    return Membership(store, facts, **more)


def candidate(store: Memory, name: str, *, spec: Spec = SPEC, **more: Any) -> Candidate:
    return Candidate(membership(store, name, **more), spec, say=lambda text: None)


def until(true: Callable[[], object], *, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_leads_and_the_other_ends_with_it() -> None:
    store, ends = Memory(), threading.Event()
    with candidate(store, "h1") as first, candidate(store, "h2") as second:
        said: list[object] = []

        def stands_by() -> None:
            try:
                said.append(second.lead(lambda term: "led"))
            except Stopped as error:
                said.append(str(error))

        until(lambda: first.term is not None or second.term is not None)
        leads, waits = (first, second) if first.term is not None else (second, first)
        second = waits
        thread = threading.Thread(target=stands_by)
        thread.start()
        threading.Timer(0.3, ends.set).start()
        assert leads.lead(lambda term: ends.wait() and term) == leads.term
        thread.join(timeout=10)
        assert said == ["the run was ended by the coordinator that led it"]
    assert membership(store, "h3").look().asks == {}


def test_another_leads_when_the_first_falls_silent() -> None:
    store = Away()
    first = membership(store, "h1", lease_seconds=1)
    first.enrol(SPEC)
    assert first.lead() is not None  # and never renews
    with candidate(store, "h2") as second:
        assert second.lead(lambda term: "led") == "led"


def test_one_that_is_fenced_stands_by_again() -> None:
    calls = []

    def work(term: int) -> str:
        calls.append(term)
        if len(calls) == 1:
            raise Fenced("another counts")
        return "led"

    with candidate(Memory(), "h1") as one:
        assert one.lead(work) == "led" and len(calls) == 2


def test_another_recipe_is_refused_with_the_difference() -> None:
    store = Memory()
    membership(store, "h1").enrol(SPEC)
    other = Spec(shoal="1", torch="2", code="c", recipe="another", data="d", run="/runs/a")
    with (
        candidate(store, "h2", spec=other) as one,
        pytest.raises(RunError, match="recipe: another here, r there"),
    ):
        one.lead(lambda term: None)


def test_a_registry_that_never_answers_is_given_up_with_its_address() -> None:
    """With progress meanwhile."""
    nobody, said = Etcd(["http://127.0.0.1:1"], prefix="/x/", timeout_seconds=0.2), list[str]()
    known: dict[str, Any] = {"say": said.append, "patience_seconds": 4.0}
    with (
        Candidate(membership(nobody, "h1"), SPEC, **known) as one,
        pytest.raises(RunError, match=r"--etcd: no answer for 4 s: .*http://127\.0\.0\.1:1"),
    ):
        one.lead(lambda term: None)
    assert "the registry does not answer: etcd at http://127.0.0.1:1" in said[0]


def test_who_was_cut_off_stands_by_and_ends_the_run_for_nobody() -> None:
    """All hosts listen to another by now, and the registry cannot say so."""
    store, calls = Away(), list[int]()

    def work(term: int) -> str:
        calls.append(term)
        if len(calls) == 1:
            store.away = True
            until(lambda: one._away is not None)
            threading.Timer(0.5, lambda: setattr(store, "away", False)).start()
            raise WorkerError("no host of the run is left")
        raise WorkerError("a worker fails")

    with candidate(store, "h1") as one, pytest.raises(WorkerError, match="a worker fails"):
        one.lead(work)
    assert len(calls) == 2


class Led:
    """A coordinator that leads, and what it writes."""

    def __init__(self, store: Memory, run: Path, name: str = "h1") -> None:
        self.membership, self.said = membership(store, name), list[str]()
        self.membership.enrol(SPEC)
        self.term = self.membership.lead()
        self.other: str | None = None
        self.registered = Registered(
            self.membership,
            term=lambda: self.term,
            deposed=lambda: self.other,
            run=run,
            say=self.said.append,
        )

    def announce(self, *hosts: str) -> None:
        until(lambda: self._announced(*hosts))

    def _announced(self, *hosts: str) -> bool:
        try:
            self.registered.announce(hosts, meet="tcp://h1:1")
        except NotYet:
            return False
        return True


def save(run: Path, step: int, generation: int) -> dict[str, Any]:
    """Left as workers leave it; what they say of it."""
    leave(run / "checkpoints", step, generation)
    return {"step": step, "generation": generation, "keep": 2, "best": None}


def leave(folder: Path, step: int, generation: int) -> None:
    """A save that does not count yet."""
    where = folder / waiting_name(step, generation=generation)
    where.mkdir(parents=True)
    (where / "manifest.json").write_text(f"{generation} {step}")


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_generations_and_saves_are_written_down(tmp_path: Path) -> None:
    store = Memory()
    led = Led(store, tmp_path)
    led.announce("h1", "h2")
    led.announce("h1")
    view = led.membership.look()
    assert view.generation is not None and view.generation.number == 2
    assert [slot.host for slot in view.generation.slots] == ["h1"]
    led.registered.saved(**save(tmp_path, 5, 2))
    led.registered.close()
    assert names(tmp_path) == ["step-00000005"], "committed, it is a checkpoint"
    commit = led.membership.look().commit
    assert commit is not None and commit.standing == (2, 5) and commit.place == "step-00000005"
    assert len(commit.manifest) == 32


def test_while_the_store_is_away_saves_wait_and_no_generation_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SAY_SECONDS", 0.1)
    store = Away()
    led = Led(store, tmp_path)
    led.announce("h1")
    store.away = True
    led.registered.saved(**save(tmp_path, 5, 1))
    until(lambda: led.registered.look() or led.said)
    assert led.said == [
        "the registry does not answer: training goes on, saves wait to be committed"
    ]
    for _ in range(20):
        with pytest.raises(NotYet):
            led.registered.announce(["h1"], meet="tcp://h1:1")
        time.sleep(0.01)
    assert names(tmp_path) == ["uncommitted-step-00000005.g1"]
    store.away = False
    until(lambda: led.registered.look() or len(led.said) == 2)
    assert led.said[1] == "the registry answers again"
    led.registered.close()
    commit = led.membership.look().commit
    assert commit is not None and commit.step == 5


def test_who_no_longer_leads_is_fenced(tmp_path: Path) -> None:
    store = Memory()
    led = Led(store, tmp_path)
    led.announce("h1")
    led.membership.leave()
    other = Led(store, tmp_path, "h2")
    other.announce("h2")
    with pytest.raises(Fenced, match="generation 3 by h1 does not count: h2-1 coordinates"):
        led.announce("h1")
    led.registered.saved(**save(tmp_path, 6, 1))
    with pytest.raises(Fenced, match="step 6 of generation 1 does not count"):
        until(lambda: led.registered.look())
    led.other = "h2-1"
    with pytest.raises(Fenced, match="h2-1 coordinates by now"):
        led.registered.look()
    assert other.membership.look().commit is None


def test_a_save_that_is_gone_or_of_an_older_generation_is_not_committed(tmp_path: Path) -> None:
    led = Led(Memory(), tmp_path)
    led.announce("h1")
    led.registered.saved(step=5, generation=1, keep=2, best=None)
    led.announce("h1")
    led.registered.saved(**save(tmp_path, 6, 1))
    led.registered.close()
    assert led.membership.look().commit is None


def test_who_leads_next_puts_the_folder_right(tmp_path: Path) -> None:
    """What the last generation saved whole counts; what an older one left late does not."""
    store, folder = Memory(), tmp_path / "checkpoints"
    led = Led(store, tmp_path)
    led.announce("h1")
    led.announce("h1")
    led.registered.saved(**save(tmp_path, 5, 2))
    led.registered.close()
    leave(folder, 10, 2)
    leave(folder, 99, 1)
    led.membership.leave()
    other = Led(store, tmp_path, "h2")
    other.registered.recover()
    assert names(tmp_path) == ["step-00000005", "step-00000010"]
    assert other.said == ["a save that was never committed goes: uncommitted-step-00000099.g1"]
    commit = other.membership.look().commit
    assert commit is not None and commit.standing == (2, 10)


def test_who_was_slow_to_give_a_name_harms_nothing(tmp_path: Path) -> None:
    """Another coordinator has given it meanwhile."""
    folder = tmp_path / "checkpoints"
    leave(folder, 5, 1)
    source = folder / waiting_name(5, generation=1)

    class Slow(Files):
        """Somebody else renames the save just before."""

        def rename(self, source: Path, target: Path) -> None:
            if source.name.startswith("uncommitted") and source.exists():
                source.rename(target)
            super().rename(source, target)

    with pytest.raises(FileNotFoundError):
        publish(folder, source, step=5, keep=2, kept=[], files=Slow())
    assert names(tmp_path) == ["step-00000005"]


def test_a_name_that_cannot_be_given_is_said(tmp_path: Path) -> None:
    led = Led(Memory(), tmp_path)
    led.announce("h1")
    fields = save(tmp_path, 5, 1)
    (tmp_path / "checkpoints" / "step-00000005").write_text("in the way")
    (tmp_path / "checkpoints" / ".step-00000005.replaced").mkdir()
    led.registered.saved(**fields)
    led.registered.close()
    assert "is committed, and cannot be given its name" in led.said[0]


def test_a_run_that_ends_while_the_store_is_away_says_where_its_save_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_END_SECONDS", 0.2)
    store = Away()
    led = Led(store, tmp_path)
    led.announce("h1")
    store.away = True
    led.registered.saved(**save(tmp_path, 5, 1))
    led.registered.close()
    assert led.said[-1].startswith("the registry does not answer: the last save is not committed")
    assert "uncommitted-step-00000005.g1" in led.said[-1]


def test_a_save_that_is_committed_while_another_takes_over_is_gone_on_from(tmp_path: Path) -> None:
    """Between what the next coordinator saw and the generation that it announced."""

    class Between(Memory):
        def change(self, put: Mapping[str, bytes], **more: Any) -> int | None:
            if "generation" in put and late:
                late.pop()()
            return super().change(put, **more)

    late: list[Callable[[], None]] = []
    store = Between()
    led = Led(store, tmp_path)
    led.announce("h1")
    led.membership.leave()
    other = Led(store, tmp_path, "h2")

    def old_one_commits() -> None:
        led.registered.saved(**save(tmp_path, 10, 1))
        led.registered._publish = lambda saved: None  # and dies
        led.registered.close()

    late.append(old_one_commits)
    other.announce("h2")
    assert names(tmp_path) == ["step-00000010"]
