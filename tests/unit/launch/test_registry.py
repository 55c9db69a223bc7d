"""One contract over both stores: what a membership promises, and what no order of faults breaks."""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import shoal
from shoal.errors import RunError
from shoal.launch.registry.etcd import Etcd
from shoal.launch.registry.membership import Fenced, Membership, Refused, newest
from shoal.launch.registry.records import Ask, Generation, HostFacts, Saved, Slot, Spec, Standing
from shoal.launch.registry.store import Compare, Entry, Memory, Store, Unknown, Unreachable
from unit.launch.etcd_server import etcd_server, has_etcd

SPEC = Spec(shoal="1", torch="2", code="c", recipe="r", data="d", run="/runs/a")
_numbers = itertools.count()


def facts(name: str, **more: Any) -> HostFacts:
    return HostFacts(host=f"{name}-1", name=name, address="10.0.0.1", port=0, cores=2, **more)


def generation(number: int, by: str, *hosts: str) -> Generation:
    slots = tuple(Slot(host=f"{name}-1", worker=0) for name in hosts)
    return Generation(
        number=number, coordinator=f"{by}-1", slots=slots, meet="tcp://10.0.0.1:1", base=(0, 0)
    )


def save(number: int, step: int) -> Saved:
    return Saved(generation=number, step=step, place=f"step-{step}.g{number}", manifest="m")


@pytest.fixture(scope="session")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if not has_etcd():
        pytest.skip("etcd is not installed (Debian's etcd-server)")
    with etcd_server(tmp_path_factory.mktemp("etcd")) as found:
        yield found


@pytest.fixture(params=["memory", "etcd"])
def store(request: pytest.FixtureRequest) -> Store:
    if request.param == "memory":
        return Memory()
    found = request.getfixturevalue("endpoint")
    return Etcd([found], prefix=f"/shoal/test-{next(_numbers)}/")


def members(store: Store, *names: str, **more: Any) -> list[Membership]:
    every = [Membership(store, facts(name), **more) for name in names]
    for each in every:
        each.enrol(SPEC)
    return every


def test_hosts_see_one_another(store: Store) -> None:
    one, two = members(store, "h1", "h2")
    assert {each.name for each in one.look().hosts.values()} == {"h1", "h2"}
    two.tell(msgspec.structs.replace(two.host, standing=(3, 40), cannot_reach=("h1-1",)))
    held = one.look().hosts
    assert held["h2-1"].cannot_reach == ("h1-1",)
    assert newest(held) == (Standing(3, 40), ["h2-1"])
    two.leave()
    two.leave()
    assert list(one.look().hosts) == ["h1-1"] and not two.keep()
    with pytest.raises(Fenced, match="its lease has ended"):
        two.tell(two.host)


def test_another_run_is_refused_with_the_difference(store: Store) -> None:
    (one,) = members(store, "h1")
    other = Membership(store, facts("h2"))
    with pytest.raises(
        Refused, match=r"h2 cannot take part in a run of h1(.|\n)*recipe: x here, r"
    ):
        other.enrol(msgspec.structs.replace(SPEC, recipe="x"))
    assert list(one.look().hosts) == ["h1-1"]


def test_of_another_recipe_the_keys_are_named(store: Store) -> None:
    (one,) = members(store, "h1")
    spec = msgspec.structs.replace(SPEC, run="/runs/b", data="e", recipe='{"train": {"steps": 5}}')
    mine = msgspec.structs.replace(spec, data="d", recipe='{"train": {"steps": 6}}')
    other = Membership(Memory(), facts("h3"))
    other.enrol(spec)
    wanted = (
        r"a run of h3: it differs\n    recipe.train.steps: 6 here, 5 there\n    data: d here, e"
    )
    with pytest.raises(Refused, match=wanted):
        Membership(other._store, one.host).enrol(mine)


def test_one_coordinates_and_the_next_one_after_it(store: Store) -> None:
    one, two = members(store, "h1", "h2")
    term = one.lead()
    assert term and one.lead() == term and two.lead() is None
    assert two.look().coordinator == "h1-1"
    token = one.announce(generation(1, "h1", "h1", "h2"), term=term, after=0)
    assert two.look().token == token
    one.leave()
    later = two.lead()
    assert later and later > term
    with pytest.raises(Fenced, match="h2-1 coordinates"):
        one.announce(generation(2, "h1", "h1"), term=term, after=token)
    with pytest.raises(Fenced, match="generation 1 is the last"):
        two.announce(generation(2, "h2", "h2"), term=later, after=token + 1)
    assert two.announce(generation(2, "h2", "h2"), term=later, after=token) > token


def test_only_the_last_generation_commits(store: Store) -> None:
    one, two = members(store, "h1", "h2")
    term = one.lead()
    assert term
    token = one.announce(generation(1, "h1", "h1", "h2"), term=term, after=0)
    one.commit(save(1, 10), token=token)
    one.commit(save(1, 10), token=token)
    with pytest.raises(Fenced, match="step 10 is committed"):
        one.commit(save(1, 5), token=token)
    one.leave()
    later = two.lead()
    assert later
    newer = two.announce(generation(2, "h2", "h2"), term=later, after=token)
    with pytest.raises(Fenced, match="generation 2 is the last"):
        one.commit(save(1, 20), token=token)
    two.commit(save(2, 12), token=newer)
    assert one.look().commit == save(2, 12)


def test_asks_are_taken_off_by_the_coordinator(store: Store) -> None:
    one, two = members(store, "h1", "h2")
    term = one.lead()
    assert term
    number = two.ask(Ask(what="drain", host="h2"))
    assert one.look().asks == {number: Ask(what="drain", host="h2")}
    two.answered(number, term=term + 1)
    assert number in one.look().asks, "who does not coordinate takes nothing off"
    one.answered(number, term=term)
    assert not one.look().asks


@pytest.mark.slow
def test_a_lease_ends_when_nobody_renews_it(store: Store) -> None:
    one, two = members(store, "h1", "h2", lease_seconds=1)
    assert two.lead()
    for _ in range(14):
        assert one.keep()
        time.sleep(0.25)
    view = one.look()
    assert list(view.hosts) == ["h1-1"] and view.coordinator is None
    assert not two.keep() and two.lead() is None and one.lead()


def test_what_another_version_wrote_is_refused(store: Store) -> None:
    (one,) = members(store, "h1")
    for value in (b"{", b'{"what": "explode"}', b'{"what": "save", "more": 1}', b"\xff"):
        store.change({"asks/1": value})
        with pytest.raises(Refused, match="none of this version of shoal"):
            one.look()


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("10.0.0.1:2379", "expected http"),
        ("http://10.0.0.1:x", "expected http"),
        ("http://10.0.0.1:2379", r"whoever can reach it could steer the run(.|\n)*https"),
    ],
)
def test_endpoints_that_are_refused(endpoint: str, said: str) -> None:
    with pytest.raises(RunError, match=said):
        Etcd([endpoint], prefix="/shoal/x/")


def test_the_server_of_this_host_is_asked_first() -> None:
    """Another host that is lost takes its server along, which would be waited for."""
    with ExitStack() as open_ones:
        other, own = (open_ones.enter_context(socket.socket()) for _ in range(2))
        addresses = []
        for each, host in ((other, "127.0.0.2"), (own, "127.0.0.1")):
            each.bind((host, 0))
            each.listen()
            each.settimeout(5)
            addresses.append(f"http://{host}:{each.getsockname()[1]}")
        store = Etcd(addresses, prefix="/shoal/x/", timeout_seconds=0.2, insecure=True)
        asked_before = []

        def answer() -> None:
            connection, _ = own.accept()
            asked_before.append(bool(select.select([other], [], [], 0)[0]))
            connection.close()

        answering = threading.Thread(target=answer)
        answering.start()
        with pytest.raises(Unreachable):
            store.read()
        answering.join()
        other.accept()[0].close()
    assert asked_before == [False]


def test_nobody_answers() -> None:
    nobody = Etcd(["http://127.0.0.1:1"], prefix="/shoal/x/", timeout_seconds=0.5)
    with pytest.raises(Unreachable, match=r"etcd at http://127\.0\.0\.1:1: none answers"):
        nobody.read()
    with pytest.raises(Unknown, match="no answer to a change"):
        nobody.change({"a": b"b"})


def test_no_wall_clock_is_compared() -> None:
    """Hosts' clocks differ by minutes: nothing that decides membership may ask for the time."""
    folder = Path(shoal.__file__).parent / "launch" / "registry"
    texts = {path.name: path.read_text() for path in folder.glob("*.py")}
    assert texts
    for name, text in texts.items():
        assert not re.search(r"time\.time\(|datetime|time_ns|perf_counter", text), name


class Flaky:
    """A store whose answers get lost, before or after the change was made, or made much later."""

    def __init__(self, store: Store) -> None:
        self.store, self.fate = store, "answers"
        self.late: list[tuple[Any, Any]] = []

    def read(self) -> dict[str, Entry]:
        if self.fate != "answers":
            raise Unreachable("cut off")
        return self.store.read()

    def change(
        self, put: Mapping[str, bytes], *, when: Sequence[Compare] = (), **more: Any
    ) -> int | None:
        if self.fate == "answers":
            return self.store.change(put, when=when, **more)
        if self.fate == "late":
            self.late.append((put, {"when": when, **more}))
        if self.fate == "answer lost":
            with suppress(LookupError):
                self.store.change(put, when=when, **more)
        raise Unknown("no answer")

    def arrive(self) -> None:
        """What was under way for so long."""
        for put, more in self.late:
            with suppress(LookupError):
                self.store.change(put, **more)
        self.late.clear()

    def grant(self, seconds: int) -> int:
        return self.store.grant(seconds)

    def keep(self, lease: int) -> bool:
        if self.fate != "answers":
            raise Unreachable("cut off")
        return self.store.keep(lease)

    def revoke(self, lease: int) -> None:
        self.store.revoke(lease)


class Written:
    """A store that keeps everything that was ever written to it, in order."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.log: list[tuple[str, bytes]] = []
        self.grant, self.keep, self.revoke, self.read = (
            store.grant,
            store.keep,
            store.revoke,
            store.read,
        )

    def change(self, put: Mapping[str, bytes], **more: Any) -> int | None:
        done = self.store.change(put, **more)
        if done is not None:
            self.log += list(put.items())
        return done


HOSTS = ("h1", "h2", "h3")
one_of = st.sampled_from(HOSTS)


class Faults(RuleBasedStateMachine):
    """Hosts that come, go, lie low and come back, over a store whose answers get lost."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def new_store(self) -> Store:
        return Memory(clock=lambda: self.now)

    @initialize()
    def begin(self) -> None:
        self.written = Written(self.new_store())
        self.links = {name: Flaky(self.written) for name in HOSTS}
        self.hosts = {name: Membership(self.links[name], facts(name)) for name in HOSTS}
        self.terms: dict[str, int] = {}
        self.tokens: dict[str, tuple[int, int]] = {}
        """What each host believes: the generation that it obeys, and its token."""
        self.step = 0

    @rule(name=one_of)
    def enrol(self, name: str) -> None:
        with suppress(Unreachable, Unknown, Fenced):
            self.hosts[name].enrol(SPEC)

    @rule(name=one_of)
    def keep(self, name: str) -> None:
        with suppress(Unreachable):
            self.hosts[name].keep()

    @rule(seconds=st.sampled_from([1.0, 3.0, 7.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(name=one_of, fate=st.sampled_from(["answers", "cut", "answer lost", "late"]))
    def link(self, name: str, fate: str) -> None:
        self.links[name].fate = fate

    @rule(name=one_of)
    def arrive(self, name: str) -> None:
        self.links[name].arrive()

    @rule(name=one_of)
    def lead(self, name: str) -> None:
        with suppress(Unreachable, Unknown):
            term = self.hosts[name].lead()
            if term is not None:
                self.terms[name] = term

    @rule(name=one_of, fresh=st.booleans())
    def announce(self, name: str, fresh: bool) -> None:
        """With what it sees now, or (not `fresh`) with what it saw long ago."""
        if name not in self.terms:
            return
        with suppress(Unreachable, Unknown, Fenced):
            number, token = self.tokens.get(name, (0, 0))
            if fresh:
                view = self.hosts[name].look()
                number, token = (view.generation.number if view.generation else 0), view.token
            made = generation(number + 1, name, name)
            found = self.hosts[name].announce(made, term=self.terms[name], after=token)
            self.tokens[name] = (number + 1, found)

    @rule(name=one_of)
    def obey(self, name: str) -> None:
        with suppress(Unreachable):
            view = self.hosts[name].look()
            if view.generation is not None:
                self.tokens[name] = (view.generation.number, view.token)

    @rule(name=one_of, back=st.integers(0, 2))
    def commit(self, name: str, back: int) -> None:
        if name not in self.tokens:
            return
        number, token = self.tokens[name]
        self.step += 1
        with suppress(Unreachable, Unknown, Fenced):
            self.hosts[name].commit(save(number, max(0, self.step - back)), token=token)

    def teardown(self) -> None:
        if hasattr(self, "written"):
            assert_in_order(self.written.log)


def assert_in_order(log: Sequence[tuple[str, bytes]]) -> None:
    """Of all that was written: generations count up, and a save is of the last one before it."""
    number, last = 0, (-1, -1)
    for key, value in log:
        if key == "generation":
            found = json.loads(value)["number"]
            assert found == number + 1, "a generation follows the last one"
            number = found
        if key == "commit":
            saved = json.loads(value)
            assert saved["generation"] == number, "no save of an older generation counts"
            standing = (saved["generation"], saved["step"])
            assert standing > last, "no save takes the place of a later one"
            last = standing


HISTORIES = settings(
    max_examples=50,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("histories", [50, pytest.param(200, marks=pytest.mark.slow)])
def test_no_history_commits_what_is_superseded(histories: int) -> None:
    """Random schedules of faults."""
    run_state_machine_as_test(Faults, settings=settings(HISTORIES, max_examples=histories))


def test_the_check_can_fail() -> None:
    """A save of an older generation, written past the membership, is found in the history."""
    written = Written(Memory())
    one, two = members(written, "h1", "h2")
    term = one.lead()
    assert term
    token = one.announce(generation(1, "h1", "h1"), term=term, after=0)
    one.commit(save(1, 10), token=token)
    one.leave()
    later = two.lead()
    assert later
    two.announce(generation(2, "h2", "h2"), term=later, after=token)
    assert_in_order(written.log)
    written.change({"commit": msgspec.json.encode(save(1, 20))})
    with pytest.raises(AssertionError, match="no save of an older generation counts"):
        assert_in_order(written.log)


@pytest.mark.slow
def test_nor_does_one_over_etcd(endpoint: str) -> None:
    """20 of them over etcd, whose own history of each key is read back."""
    prefixes: list[str] = []

    class OverEtcd(Faults):
        def new_store(self) -> Store:
            prefixes.append(f"/shoal/history-{next(_numbers)}/")
            return Etcd([endpoint], prefix=prefixes[-1])

    run_state_machine_as_test(OverEtcd, settings=settings(HISTORIES, max_examples=20))
    for prefix in prefixes:
        assert_in_order(history(endpoint, prefix))


def history(
    endpoint: str, prefix: str, *, within: Callable[..., subprocess.Popen[str]] | None = None
) -> list[tuple[str, bytes]]:
    """Every value that keys below `prefix` ever had, by etcd's own watch from the beginning.

    `within`: how to start a process where the endpoint is reached.
    """
    words = ["timeout", "3", "etcdctl", "--endpoints", endpoint, "watch", "--prefix", prefix]
    start: Callable[..., subprocess.Popen[str]] = within or (
        lambda *given, **more: subprocess.Popen(given, text=True, **more)
    )
    environment = {**os.environ, "ETCDCTL_API": "3"}
    process = start(*words, "--rev", "1", "-w", "json", stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    found, lines = list[tuple[str, bytes]](), process.stdout
    with process, lines:
        for line in lines:
            for event in json.loads(line).get("Events", []):
                if "type" not in event:
                    entry = event["kv"]
                    key = base64.b64decode(entry["key"]).decode().removeprefix(prefix)
                    found.append((key, base64.b64decode(entry["value"])))
    return found
