"""Runs around a parameter server whose workers and servers die, stop and come back.

Real processes and real signals; what must be the same bits is compared with an undisturbed run.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from shoal.checkpoint.store import Store
from shoal.comm.keys import Keys
from shoal.comm.requests import Caller
from shoal.data.verify import verify_run
from shoal.engine.job import Instruments
from shoal.errors import ChannelError, ConfigError, Stopped
from shoal.launch import local
from shoal.observe.events import read_lines
from tiny import Bench, Run, shoal

TWO = (
    "parallel.replicate=2",
    "launch.workers=processes",
    "train.steps=24",
    "train.evaluate_every_steps=0",
)
SYNCHRONOUS = "sync={kind: server, consistency: {kind: bounded, staleness: 0}}"
EVERY_STEP = "sync={kind: every-step}"
BOUNDED = "sync={kind: server, consistency: {kind: bounded, staleness: 2}}"
ASYNCHRONOUS = "sync={kind: server, consistency: {kind: asynchronous}}"
QUORUM = (
    "sync={kind: server, consistency: {kind: quorum, least: 1, grace_seconds: 0.05}, push: deltas,"
    " every_steps: 4, optimizer: {kind: delayed-nesterov}}"
)


class Disturbed:
    """A run to which something happens once its metrics have so many rows."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.story = bench, list[dict[str, Any]]()
        self.run = Run(bench.new_path())

    def train(
        self,
        *overrides: str,
        rows: int = 0,
        happens: Callable[[Disturbed], None] | None = None,
        faults: tuple[dict[str, Any], ...] = (),
    ) -> Disturbed:
        """Train; `happens` is called in a thread of its own after `rows` rows."""
        over, failures = threading.Event(), list[BaseException]()

        def wait() -> None:
            while not over.is_set() and len(self.run.rows) < rows:
                time.sleep(0.005)
            if not over.is_set() and happens is not None:
                try:
                    happens(self)
                except BaseException as error:
                    failures.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        numbered = tuple({**fault, "number": n} for n, fault in enumerate(faults))
        try:
            local.train(
                self.bench.recipe,
                overrides,
                out=self.run.path,
                console=False,
                pool=self.bench.pool,
                story=self.story,
                instruments=Instruments(planned_faults=numbered),
            )
        finally:
            over.set()
            thread.join()
        assert not failures, failures
        return self

    def of(self, event: str) -> list[dict[str, Any]]:
        return [each for each in self.story if each["event"] == event]

    def signal_server(self, number: signal.Signals) -> None:
        os.kill(self.of("serving")[-1]["pid"], number)


def steps_of(run: Run) -> list[int]:
    return [row["step"] for row in run.rows if "loss" in row]


@pytest.mark.quick(1)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_only_server_dies_and_nothing_is_lost(bench: Bench, number: signal.Signals) -> None:
    """The same digits as without: what was acknowledged was on the disk, the rest came again."""
    wanted = bench.run(*TWO, SYNCHRONOUS)
    disturbed = Disturbed(bench).train(
        *TWO, SYNCHRONOUS, rows=6, happens=lambda it: it.signal_server(number)
    )
    assert len(disturbed.of("serving")) == 2 and len(disturbed.of("lost-server")) == 1
    assert disturbed.of("lost") == [], "workers wait for it"
    assert disturbed.run.digits == wanted.digits
    assert disturbed.run.weights == wanted.weights
    assert not (disturbed.run.path / "server" / "0").exists(), "needed no more: the run is saved"


@pytest.mark.slow
def test_a_server_that_runs_without_end_is_named_and_replaced(bench: Bench) -> None:
    wanted = bench.run(*TWO, SYNCHRONOUS)
    fault = {"kind": "spin-server", "rank": -1, "server": 0, "step": 6, "number": 0}
    out = bench.new_path()
    local.train(
        bench.recipe,
        (*TWO, SYNCHRONOUS),
        out=out,
        console=False,
        pool=bench.pool,
        instruments=Instruments(planned_faults=(fault,)),
    )
    (lost,) = [each for each in read_lines(out / "events.jsonl") if each["event"] == "lost-server"]
    assert lost["text"].startswith("parameter server 0 has begun no turn for"), lost
    run = Run(out)
    assert run.losses == wanted.losses and run.weights == wanted.weights


@pytest.mark.slow
def test_a_server_without_a_disk_sends_the_run_back_to_its_save(bench: Bench) -> None:
    wanted = bench.run(*TWO, SYNCHRONOUS)
    disturbed = Disturbed(bench).train(
        *TWO,
        SYNCHRONOUS.replace("}}", "}, durable: false}"),
        rows=12,
        happens=lambda it: it.signal_server(signal.SIGKILL),
    )
    assert len(disturbed.of("restarted")) == 1 and len(disturbed.of("lost-server")) == 1
    assert disturbed.run.losses == wanted.losses and disturbed.run.weights == wanted.weights


@pytest.mark.parametrize(
    ("sync", "rank", "kind"),
    [
        (ASYNCHRONOUS, 1, "kill"),
        pytest.param(ASYNCHRONOUS, 0, "kill", marks=pytest.mark.slow),
        pytest.param(BOUNDED, 1, "stop", marks=pytest.mark.slow),
        (BOUNDED, 0, "kill"),
        pytest.param(QUORUM, 1, "kill", marks=pytest.mark.slow),
        pytest.param(QUORUM, 0, "stop", marks=pytest.mark.slow),
    ],
)
def test_a_worker_dies_and_another_takes_its_place(
    bench: Bench, sync: str, rank: int, kind: str
) -> None:
    disturbed = Disturbed(bench).train(
        *TWO, sync, faults=({"kind": kind, "rank": rank, "step": 7},)
    )
    assert [each["rank"] for each in disturbed.of("lost")] == [rank]
    steps = steps_of(disturbed.run)
    assert steps == sorted(set(steps))
    if rank != 0 or sync == ASYNCHRONOUS:
        assert steps == list(range(1, 25)), "the run that speaks has missed no step"
    assert disturbed.of("restarted") == [], "nobody went back to a checkpoint"
    last = Store(disturbed.run.path / "checkpoints").open(24).state["policies"][0]
    clocks = {"0": 24, "1": 24} if sync != QUORUM else {"0": 6, "1": 6}
    assert last["clocks"] == clocks, "every replica came to its end"
    assert disturbed.run.losses[-1] < disturbed.run.losses[0]
    stale = [row["staleness"] for row in disturbed.run.rows if "staleness" in row]
    assert len(stale) == len(steps) and (sync != BOUNDED or max(stale) <= 2)
    report = verify_run(disturbed.run.path)
    assert report.num_steps == 24
    if sync == BOUNDED:  # what the lost one did not push was left out, and that is said
        assert all("samples, expected" in problem for problem in report.problems)
    else:
        assert report.problems == [], "every sample once"


def test_asked_to_stop_it_saves_what_all_have_done(bench: Bench) -> None:
    """Without staleness all stop after one step; resumed, the digits are those of no stop."""
    wanted = bench.run(*TWO, SYNCHRONOUS)
    disturbed = Disturbed(bench)

    def ask(it: Disturbed) -> None:
        (it.run.path / "STOP").touch()

    with pytest.raises(Stopped, match="shoal resume"):
        disturbed.train(*TWO, SYNCHRONOUS, rows=6, happens=ask)
    (step,) = Store(disturbed.run.path / "checkpoints").steps()[-1:]
    assert 6 <= step < 24
    bench.resume(disturbed.run)
    assert disturbed.run.digits == wanted.digits and disturbed.run.weights == wanted.weights


@pytest.mark.parametrize("sync", [SYNCHRONOUS, pytest.param(QUORUM, marks=pytest.mark.slow)])
def test_paused_and_resumed_it_goes_on(bench: Bench, sync: str) -> None:
    wanted = bench.run(*TWO, sync)
    run = bench.train(*TWO, sync, "train.stop_after_steps=11")
    bench.resume(run)
    assert steps_of(run) == list(range(1, 25))
    assert verify_run(run.path).problems == []
    if sync == SYNCHRONOUS:
        assert run.digits == wanted.digits and run.weights == wanted.weights


@pytest.mark.slow
def test_a_checkpoint_of_one_policy_is_one_of_any(bench: Bench) -> None:
    """AdamW's moments at the server are those of the run: every-step goes on with them."""
    how = (*TWO, "train.max_gradient_norm=null")
    wanted = load_file(bench.run(*how).path / "model" / "model.safetensors")
    for first, then in ((SYNCHRONOUS, "sync={kind: every-step}"), (EVERY_STEP, SYNCHRONOUS)):
        run = bench.train(*how, first, "train.stop_after_steps=11")
        bench.resume(run, then)
        assert steps_of(run) == list(range(1, 25))
        for name, tensor in load_file(run.path / "model" / "model.safetensors").items():
            # AdamW divides by roots near zero, which makes more of the order of a sum
            assert float((tensor - wanted[name]).abs().max()) < 1e-5 * float(tensor.abs().max())


def test_strangers_are_refused_while_the_run_goes_on(bench: Bench, tmp_path: Path) -> None:
    """A worker with another key, noise, and a frame of 4 GiB: the digits stay the same."""
    wanted = bench.run(*TWO, SYNCHRONOUS)

    def knock(it: Disturbed) -> None:
        address = it.of("serving")[0]["address"]
        (tmp_path / "server").write_text(address)
        caller = Caller(
            tmp_path / "server",
            keys=Keys.make(tmp_path / "keys"),
            name="parameter server 0",
            patience_seconds=0.3,
        )
        with pytest.raises(ChannelError, match="parameter server 0 at"):
            caller.ask(b"let me in")
        caller.close()
        for sent in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" + bytes(8) + b"\x7f\x03\xff\xff\xff\xff"):
            with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as it_:
                it_.sendall(sent * 100)

    disturbed = Disturbed(bench).train(*TWO, SYNCHRONOUS, rows=4, happens=knock)
    assert disturbed.of("lost") == disturbed.of("lost-server") == []
    assert disturbed.run.digits == wanted.digits and disturbed.run.weights == wanted.weights


@pytest.mark.slow
def test_everything_dies_and_a_resume_goes_on_where_the_server_was(
    bench: Bench, tmp_path: Path
) -> None:
    """kill -9 of the whole run between two saves: the server's disk is ahead of the checkpoint."""
    how = (*TWO, SYNCHRONOUS, "train.steps=60", "checkpoint.every_steps=40")
    wanted, run = bench.run(*how), Run(tmp_path / "run")
    process = subprocess.Popen(
        shoal("train", bench.recipe, *how, "--out", run.path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    while len(run.rows) < 13 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert 13 <= steps_of(run)[-1] < 40, "no checkpoint yet"
    time.sleep(0.5)  # the workers end with it
    bench.resume(run)
    events = read_lines(run.path / "events.jsonl")
    assert sum(e["rows"] for e in events if e["event"] == "redone") <= 1
    ours = {row["step"]: row["loss"] for row in run.rows if "loss" in row}
    theirs = dict(enumerate(wanted.losses, 1))
    assert len(ours) >= 59, "of a step that was pushed when the kill came the row may be missing"
    assert ours.items() <= theirs.items() and run.weights == wanted.weights
    assert verify_run(run.path).problems == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["sync={kind: server, consistency: {kind: quorum, least: 3}}"],
            r"(?s)are 2 rep.*at most",
        ),
        (["sync={kind: server, every_steps: 4}"], r"(?s)every_steps.*push: deltas"),
        (["sync={kind: server, push: deltas}"], r"(?s)needs another at the server"),
        (["sync={kind: server}", "train.optimizer={kind: muon}"], r"(?s)muon.*whole matrices"),
        (["sync={kind: server}", "launch.workers=threads"], r"(?s)server needs parameters"),
        (
            ["sync={kind: server}", "parallel.tensor=2"],
            r"(?s)copies.*shard and context",
        ),
        (["sync={kind: server}", "train.exact=true"], r"(?s)train.exact.*server"),
        (["sync={kind: server, consistency: {kind: eventual}}"], r"(?s)asynchronous"),
    ],
)
def test_what_cannot_be_is_refused_before_a_worker_starts(
    bench: Bench, overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        bench.train(*TWO, *overrides)
