"""Training over several agents, all on this machine and in this process: digits, losses, refusals.

tests/hosts does the same over hosts with networks of their own.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from held_agent import SECRET, HeldAgent
from shoal.config.load import load_recipe
from shoal.environment import AGENT_PORT
from shoal.errors import ConfigError, RunError, Stopped, UserError
from shoal.launch import agent, hosts, local
from shoal.launch.clusters.hosts_file import commands, read_hosts
from shoal.launch.directory import has_checkpoint, is_run
from shoal.launch.links import Measured
from shoal.launch.over_hosts import OverHosts
from shoal.launch.pool import Worker, WorkerPool
from shoal.launch.registry.membership import Fenced
from shoal.launch.registry.registered import Registered
from shoal.launch.registry.store import Memory
from shoal.launch.secret import read_secret
from shoal.launch.site import Found
from shoal.launch.supervised import left_by_another
from shoal.layout import Layout
from shoal.observe.events import read_lines
from tiny import Bench, Run
from unit.launch.test_standby import SPEC, membership

TWO = ("parallel.replicate=2", "train.steps=8", "train.evaluate_every_steps=4")


@pytest.fixture
def agents(pool: WorkerPool) -> Iterator[list[HeldAgent]]:
    made = [HeldAgent(pool), HeldAgent(pool)]
    yield made
    for each in made:
        each.close()


def over(agents: list[HeldAgent], **more: Any) -> OverHosts:
    return OverHosts([each.agent.address for each in agents], SECRET, **more)


def test_digits_are_those_of_one_machine(bench: Bench, agents: list[HeldAgent]) -> None:
    out = bench.new_path()
    local.train(bench.recipe, TWO, out=out, console=False, pool=bench.pool, hosts=over(agents))
    one_machine = bench.run(*TWO)
    assert Run(out).digits == one_machine.digits
    assert Run(out).weights == one_machine.weights
    assert [each.agent.ended for each in agents] == [0, 0]
    assert not (out / ".hosts").exists()


def test_a_plan_over_hosts_trains_as_the_same_layout_on_one_machine(
    bench: Bench, agents: list[HeldAgent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica may lie on both: with a cable so slow, stages do. What was measured is kept."""
    measured = agent.measure
    asked = itertools.count()

    def slowly(address: str, *, sends: bool) -> Measured:
        """Pings, then the ring, then each to itself: two tests of each."""
        found, number = measured(address, sends=sends), next(asked)
        return Measured(1e5 if sends else 0.0, 0.01) if number < 4 else found

    monkeypatch.setattr(agent, "measure", slowly)
    words = ("parallel=auto", "train.steps=8", "train.evaluate_every_steps=4")
    out = bench.new_path()
    local.train(bench.recipe, words, out=out, console=False, pool=bench.pool, hosts=over(agents))
    plan = json.loads((out / "plan.json").read_text())
    assert plan["measured"]["links"]["between"] == {"bytes_per_second": 1e5, "seconds": 0.005}
    assert plan["layout"]["pipeline"] > 1 == plan["layout"]["replicate"]
    assert "s a step over 2 hosts" in plan["reason"]
    events = [row for row in read_lines(out / "events.jsonl") if row["event"] == "links"]
    assert [row["between"] for row in events] == [plan["measured"]["links"]["between"]]
    degrees = ", ".join(f"{axis}: {n}" for axis, n in plan["layout"].items() if n > 1)
    micro = f"train.micro_batch_samples={plan['micro_batch_samples']}"
    one_machine = bench.run(f"parallel={{{degrees}}}", micro, *words[1:])
    assert Run(out).digits == one_machine.digits
    assert Run(out).weights == one_machine.weights


@pytest.mark.slow
def test_exact_replicas_of_a_host_sum_among_themselves_first(
    bench: Bench, agents: list[HeldAgent]
) -> None:
    """And have the bits of all at once (the bytes: tests/unit/sync/test_bytes.py)."""
    words = ("train.exact=true", "parallel.replicate=4", "train.steps=4")
    words += ("train.evaluate_every_steps=4", "train.micro_batch_samples=2")
    out = bench.new_path()
    local.train(bench.recipe, words, out=out, console=False, pool=bench.pool, hosts=over(agents))
    assert load_recipe(str(out / "config.yaml")).sync.group_replicas == 2  # type: ignore[union-attr]
    one_machine = bench.run(*words)
    assert Run(out).digits == one_machine.digits
    assert Run(out).weights == one_machine.weights


LONG = ("train.steps=100000", "train.evaluate_every_steps=50000", "checkpoint.every_steps=50000")


class Training:
    """A run in a thread of its own, which is asked to stop at the end."""

    def __init__(
        self, bench: Bench, hosts: OverHosts, *overrides: str, out: Path | None = None
    ) -> None:
        self.out = out or bench.new_path()
        go_on = out is not None and is_run(out)
        self.error: BaseException | None = None

        def body() -> None:
            known: dict[str, Any] = {"console": False, "pool": bench.pool}
            known["go_on"] = go_on
            try:
                local.train(bench.recipe, overrides, out=self.out, hosts=hosts, **known)
            except BaseException as error:
                self.error = error

        self._thread = threading.Thread(target=body)
        self._thread.start()

    def wait_for(self, true: Callable[[], bool], *, seconds: float = 60.0) -> float:
        began = time.monotonic()
        while not true():
            alive = self._thread.is_alive() or self.error is not None
            assert time.monotonic() - began < seconds and alive, (
                self.error,
                [each.get("text") for each in read_lines(self.out / "events.jsonl")],
            )
            time.sleep(0.02)
        return time.monotonic() - began

    def has_ended(self) -> bool:
        return self.error is not None

    def steps(self) -> int:
        return len(Run(self.out).losses) if (self.out / "metrics.jsonl").exists() else 0

    def events(self, name: str) -> list[dict[str, Any]]:
        found = read_lines(self.out / "events.jsonl")
        return [each for each in found if each["event"] == name]

    def stop(self) -> None:
        if self._thread.is_alive():
            (self.out / "STOP").touch()
        self._thread.join(timeout=30)


def test_a_silent_host_is_done_without_and_comes_back(
    bench: Bench, agents: list[HeldAgent]
) -> None:
    """Its workers still run, and wait in a sum: the others' connections are broken at once."""
    exact = ("train.exact=true", "parallel.replicate={min: 1, max: 2}", *LONG)
    run = Training(bench, over(agents, lease_seconds=1.0), *exact)
    try:
        run.wait_for(lambda: run.steps() > 5)
        agents[1].held.set()
        run.wait_for(lambda: bool(run.events("host-lost")), seconds=10)
        before = run.steps()
        assert run.wait_for(lambda: run.steps() > before + 2) < 5
        (lost,) = run.events("lost")
        assert lost["why"] == "host" and "gives no sign for 1 s" in lost["text"]
        agents[1].held.clear()
        run.wait_for(lambda: bool(run.events("host-back")))
        run.wait_for(lambda: len(run.events("generation")) == 2)
        before = run.steps()
        run.wait_for(lambda: run.steps() > before + 2)
    finally:
        run.stop()
    steps = [row["step"] for row in Run(run.out).rows if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))
    clean = bench.train(*exact, f"train.stop_after_steps={min(len(steps), 200)}")
    assert Run(run.out).losses[:200] == clean.losses[:200]


def test_a_host_that_does_not_reach_the_others_is_left_out(
    bench: Bench, agents: list[HeldAgent], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As agents say, at every test until it is over. tests/hosts cuts real cables."""
    cut, real = threading.Event(), agent.unreached

    def said(addresses: Sequence[str]) -> tuple[str, ...]:
        return tuple(addresses) if cut.is_set() else real(addresses)

    monkeypatch.setattr(agent, "unreached", said)
    for name, seconds in (("SILENT", -1.0), ("TEST_AGAIN", 0.5), ("TEST_LEFT_OUT", 0.5)):
        monkeypatch.setattr(hosts, f"_{name}_SECONDS", seconds)
    exact = ("train.exact=true", "parallel.replicate={min: 1, max: 2}", *LONG)
    run = Training(bench, over(agents), *exact)
    try:
        run.wait_for(lambda: run.steps() > 5)
        cut.set()
        run.wait_for(lambda: bool(run.events("recovered")))
        (left_out,) = run.events("left-out")
        assert agents[1].agent.address.removeprefix("tcp://") in left_out["hosts"][0]
        assert run.events("generation")[-1]["members"] == [0]
        cut.clear()
        run.wait_for(lambda: len(run.events("generation")) == 2)
        assert run.events("generation")[-1]["members"] == [0, 1]
        assert "reaches all others again" in run.events("host-back")[0]["text"]
        before = run.steps()
        run.wait_for(lambda: run.steps() > before + 2)
    finally:
        run.stop()
    assert not run.events("lost")
    steps = [row["step"] for row in Run(run.out).rows if "loss" in row]
    assert steps == list(range(1, len(steps) + 1))
    clean = bench.train(*exact, f"train.stop_after_steps={min(len(steps), 100)}")
    assert Run(run.out).losses[:100] == clean.losses[:100]


def test_hosts_that_do_not_reach_each_other_begin_nothing(
    bench: Bench, agents: list[HeldAgent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "unreached", lambda addresses: tuple(addresses))
    with pytest.raises(RunError, match="hosts do not reach each other") as caught:
        local.train(bench.recipe, TWO, console=False, pool=bench.pool, hosts=over(agents))
    for each in agents:
        assert each.agent.address.removeprefix("tcp://") in str(caught.value)


@pytest.mark.slow
def test_hosts_that_are_about_to_go_are_done_without(bench: Bench, agents: list[HeldAgent]) -> None:
    """One that a person names, then the last by its agent: then the run saves and stops."""
    exact = ("train.exact=true", "parallel.replicate={min: 1, max: 2}", *LONG)
    run = Training(bench, over(agents), *exact)
    try:
        run.wait_for(lambda: run.steps() > 5)
        (run.out / "DRAIN").write_text("nobody " + agents[1].agent.address.removeprefix("tcp://"))
        run.wait_for(lambda: bool(run.events("generation")))
        assert "asked to do without nobody" in run.events("drain")[0]["text"]
        assert "is about to go, and is done without" in run.events("drain")[1]["text"]
        assert run.events("generation")[0]["members"] == [0] and not run.events("lost")
        before = run.steps()
        run.wait_for(lambda: run.steps() > before + 2)
        agents[0].agent.leaving = True
        run.wait_for(run.has_ended, seconds=30)
    finally:
        run.stop()
    assert isinstance(run.error, Stopped)
    heard_by = time.monotonic() + 10  # agents hear of the end after whoever says it
    while None in [each.agent.ended for each in agents] and time.monotonic() < heard_by:
        time.sleep(0.05)
    assert [each.agent.ended for each in agents] == [75, 75]


@pytest.mark.slow
def test_who_comes_when_the_others_stop_is_not_left_behind(
    bench: Bench, agents: list[HeldAgent]
) -> None:
    """They may save and stop after the step in which its generation was announced."""
    exact = ("train.exact=true", "parallel.replicate={min: 1, max: 2}", *LONG)
    run = Training(bench, over(agents, lease_seconds=1.0), *exact)
    try:
        run.wait_for(lambda: run.steps() > 5)
        agents[1].held.set()
        run.wait_for(lambda: bool(run.events("recovered")))
        agents[1].held.clear()
        run.wait_for(lambda: len(run.events("generation")) == 2)
    finally:
        run.stop()
    assert isinstance(run.error, Stopped) and not run._thread.is_alive()


def test_without_room_to_shrink_another_host_takes_over(
    bench: Bench, agents: list[HeldAgent]
) -> None:
    run = Training(bench, over(agents, lease_seconds=1.0), "parallel.replicate=2", *LONG)
    try:
        run.wait_for(lambda: run.steps() > 5)
        agents[0].held.set()
        run.wait_for(lambda: bool(run.events("recovered")), seconds=15)
        (generation,) = run.events("generation")
        assert generation["members"] == [0, 1]
        agents[0].held.clear()
        run.wait_for(lambda: len(run.events("generation")) == 2)
        before = run.steps()
        run.wait_for(lambda: run.steps() > before + 2)
    finally:
        run.stop()


class Led:
    """Two coordinators of a run, one after the other, over a registry in memory."""

    def __init__(self, out: Path) -> None:
        self.out, self.store, self.other = out, Memory(), dict[str, str]()

    def over(self, agents: list[HeldAgent], name: str, **more: Any) -> OverHosts:
        """As the coordinator of host `name`, in the next term; `other` ends it."""
        me = membership(self.store, name, lease_seconds=3600)
        me.enrol(SPEC)
        term = me.lead()
        assert term is not None

        def register(run: Path, say: Callable[[str], None]) -> Registered:
            known = {"term": lambda: term, "deposed": lambda: self.other.get(name)}
            return Registered(me, run=run, say=say, **known)

        known = {"register": register, "run": str(self.out.resolve()), "term": term}
        self.leave = me.leave
        return over(agents, **known, **more)


def test_the_next_coordinator_goes_on_with_the_workers_that_run(
    bench: Bench, agents: list[HeldAgent]
) -> None:
    """No step is lost, and nothing is loaded."""
    words = ("train.exact=true", "parallel.replicate=2", *LONG)
    led = Led(bench.new_path())
    first = Training(bench, led.over(agents, "h1"), *words, out=led.out)
    first.wait_for(lambda: first.steps() > 5)
    led.leave()
    led.other["h1"] = "h2"
    first.wait_for(first.has_ended)
    assert isinstance(first.error, Fenced)
    assert (led.out / ".hosts").exists(), "the next one's, as far as the first can know"
    steps = first.steps()
    second = Training(bench, led.over(agents, "h2"), *words, out=led.out)
    try:
        second.wait_for(lambda: bool(second.events("recovered")))
        (adopted,) = second.events("adopted")
        assert adopted["members"] == [0, 1]
        assert not second.events("resumed") and not second.events("lost")
        second.wait_for(lambda: second.steps() > steps + 5)
    finally:
        second.stop()
    assert isinstance(second.error, Stopped)
    done = [row["step"] for row in Run(led.out).rows if "loss" in row]
    assert done == list(range(1, len(done) + 1))
    clean = bench.train(*words, f"train.stop_after_steps={min(len(done), 200)}")
    assert Run(led.out).losses[:200] == clean.losses[:200]
    assert has_checkpoint(led.out), "committed, before it ended"


class Slow(Memory):
    """A store that takes a second to answer."""

    def change(self, *given: Any, **more: Any) -> Any:
        time.sleep(1.0)
        return super().change(*given, **more)


@pytest.mark.slow
def test_the_model_of_cut_replicas_is_written_of_a_save_that_counts(
    bench: Bench, agents: list[HeldAgent]
) -> None:
    """It is read from the last save, which gets its name only when the registry has it."""
    words = ("parallel.replicate=2", "parallel.shard=2", "train.steps=4")
    words += ("train.evaluate_every_steps=4",)
    led = Led(bench.new_path())
    led.store = Slow()
    local.train(
        bench.recipe,
        words,
        out=led.out,
        console=False,
        pool=bench.pool,
        hosts=led.over(agents, "h1"),
    )
    assert Run(led.out).weights == bench.run(*words).weights
    assert "lost" not in Run(led.out).events, "nor by a worker that died of it"


def test_what_was_not_begun_is_of_no_use() -> None:
    """Workers that never were in a generation, or were about to end: they are ended."""

    class Left:
        gone, killed = None, list[Worker]()

        def __init__(self, *found: Found) -> None:
            self._found = found

        def found(self) -> list[Found]:
            return list(self._found)

        def kill(self, workers: list[Worker]) -> None:
            self.killed += workers

    def found(rank: int, generation: int, *, done: bool = False) -> Found:
        return Found(Worker(rank, report=-1, open=False), rank, generation, False, done)

    whole, halves = Layout(replicate=2), Layout(replicate=2, tensor=2)
    for layout, left in (
        (whole, [found(0, 0), found(1, 0)]),
        (whole, [found(0, 4), found(1, 4, done=True)]),
        (halves, [found(0, 4), found(2, 4)]),
    ):
        site: Any = Left(*left)
        site.killed = []
        assert left_by_another([site], layout=layout) == []
        assert site.killed == [one.worker for one in left]
    site = Left(found(3, 4), found(0, 4))
    assert [one.rank for one in left_by_another([site], layout=halves)] == [0, 3]


def test_hosts_that_do_not_answer_are_named(bench: Bench, agents: list[HeldAgent]) -> None:
    hosts = OverHosts([agents[0].agent.address, "tcp://127.0.0.1:1"], SECRET, patience_seconds=2)
    with pytest.raises(RunError, match=r"127\.0\.0\.1:1: no agent answers for 2 s\n.*shoal agent"):
        local.train(bench.recipe, TWO, console=False, pool=bench.pool, hosts=hosts)


def test_hosts_with_another_secret_are_named(bench: Bench, agents: list[HeldAgent]) -> None:
    hosts = OverHosts([each.agent.address for each in agents], b"t" * 32)
    with pytest.raises(RunError, match="cannot take part") as caught:
        local.train(bench.recipe, TWO, console=False, pool=bench.pool, hosts=hosts)
    for each in agents:
        name = each.agent.address.removeprefix("tcp://")
        assert f"{name} does not know this run's secret" in str(caught.value)


def test_hosts_with_another_program_are_named(
    bench: Bench, agents: list[HeldAgent], monkeypatch: pytest.MonkeyPatch
) -> None:
    from msgspec.structs import replace

    import shoal.launch.over_hosts as module

    real = module.facts()
    monkeypatch.setattr(module, "facts", lambda: replace(real, torch="1.0", name="h1", code="c"))
    with pytest.raises(RunError, match="cannot take part") as caught:
        local.train(bench.recipe, TWO, console=False, pool=bench.pool, hosts=over(agents))
    assert f"torch {real.torch} (h1: 1.0)" in str(caught.value)
    assert "other source of shoal" in str(caught.value)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("sync.kind=server", "sync.servers=1"), "sync.kind: server is for workers of one host"),
        (("launch.workers=threads",), "launch.workers: workers of several hosts are processes"),
        (("parallel.replicate=1",), "one worker does not reach 2 hosts"),
    ],
)
def test_what_hosts_cannot_do_is_refused(bench: Bench, words: tuple[str, ...], text: str) -> None:
    hosts = OverHosts(["tcp://127.0.0.1:1", "tcp://127.0.0.1:2"], SECRET)
    with pytest.raises(ConfigError, match=text):
        local.train(bench.recipe, words, console=False, pool=bench.pool, hosts=hosts)


def test_a_degree_that_no_plan_chooses_is_one_replica_a_host(bench: Bench) -> None:
    hosts = OverHosts(["tcp://h1:1", "tcp://h2:1", "tcp://h3:1"], SECRET)
    recipe = load_recipe(str(bench.recipe), ["parallel=auto", "launch.workers=auto"])
    assert hosts.overrides(recipe) == ["launch.workers=processes"]
    alone = OverHosts(["tcp://h1:1"], SECRET)
    assert alone.overrides(recipe) == ["parallel.replicate=1", "launch.workers=processes"]
    recipe = load_recipe(str(bench.recipe), ["parallel=auto", "train.exact=true"])
    assert hosts.overrides(recipe) == ["parallel.replicate=3", "launch.workers=processes"]


def test_a_secret_is_made_once_and_kept_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "shared" / "keys"
    secret = read_secret(path)
    assert len(secret) == 32 and path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("SHOAL_KEYS", str(path))
    assert read_secret(None) == secret
    monkeypatch.delenv("SHOAL_KEYS")
    with pytest.raises(UserError, match="--keys: expected the file with the secret"):
        read_secret(None)
    path.chmod(0o644)
    with pytest.raises(UserError, match=r"only its owner can read .mode 0600., found mode 0644"):
        read_secret(path)
    path.chmod(0o600)
    path.write_text("no secret")
    with pytest.raises(UserError, match="expected 64 hexadecimal digits"):
        read_secret(path)
    with pytest.raises(UserError, match="cannot be made"):
        read_secret(path / "below")


def test_a_file_of_hosts(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("h1  # the first\n\n10.0.0.2:9000\n")
    found = read_hosts(path)
    assert found == [f"tcp://h1:{AGENT_PORT}", "tcp://10.0.0.2:9000"]
    lines = commands(found, keys=Path("K"), coordinator=["shoal", "launch", "hosts", "a b.yaml"])
    assert lines[1] == "ssh 10.0.0.2 'shoal agent --listen 10.0.0.2 --port 9000 --keys K' &"
    assert lines[2].startswith("ssh h1 ") and "a b.yaml" in lines[2]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "names no host"),
        ("h1\nh1\n", "line 2: h1 is there already"),
        ("h1:99999\n", "line 1: expected HOST or HOST:PORT, got h1:99999"),
        ("h1 slots=2\n", "line 1: expected HOST or HOST:PORT"),
        (None, "cannot be read"),
    ],
)
def test_files_that_are_none_of_hosts(tmp_path: Path, text: str | None, problem: str) -> None:
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=problem):
        read_hosts(path)
