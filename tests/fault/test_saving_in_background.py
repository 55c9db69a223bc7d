"""A save behind the loop's back: what is published is what was there, or nothing is published."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import background
import pytest
from background import Ranks, newest, state_of
from processes import started, wait_for_step

from shoal.checkpoint.disks import manifest_hash, save_damage
from shoal.checkpoint.files import FaultyFiles, Files, SlowFiles
from shoal.checkpoint.folders import divided_name, waiting_name
from shoal.checkpoint.store import Store
from shoal.comm.group import ProcessGroup
from shoal.engine.membership.orders import Disk
from shoal.engine.saving.saver import KEPT, Note, Saver
from shoal.errors import RunError
from shoal.layout import Layout
from shoal.observe.events import read_lines
from tiny import Bench, Run

LENGTH = ("train.steps=20", "train.evaluate_every_steps=5", "checkpoint.every_steps=5")
BEHIND = (*LENGTH, "checkpoint.background=true")
SLOW = ("train.micro_batch_samples=1",)
PROCESSES = ("parallel.replicate=2", "launch.workers=processes")
THREADS = ("parallel.replicate=2", "launch.workers=threads")


def names(notes: list[Note]) -> list[str]:
    return [name for name, _ in notes]


def text(notes: list[Note]) -> str:
    ((_, fields),) = notes
    return str(fields["text"])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_is_published_is_what_was_there_at_the_call(tmp_path: Path, size: int) -> None:
    """The helper overwrites the state as soon as `save` returns; buffers are reused."""
    ranks = Ranks(tmp_path, size=size)
    for step in (1, 2, 3):
        ranks.save_all(step)
        assert newest(tmp_path) == step
    assert Store(tmp_path).steps() == [2, 3]
    assert Store(tmp_path).open(3).state["random_states"] == [f"{r:02x}" for r in range(size)]
    assert names(ranks.notes()) == ["saved"] * 3
    files = sorted(path.name for path in Store(tmp_path).path(3).iterdir())
    assert files == ["manifest.json", *(f"rank-{rank:05d}.safetensors" for rank in range(size))]


def test_a_host_that_has_not_all_of_it_saves_its_own(tmp_path: Path) -> None:
    """Apart from checkpoints, and told to who has it count."""
    ranks = Ranks(tmp_path, size=1, token="g3-aa")
    (saver,) = ranks.savers
    saver.generation = 3
    saver.divide(Disk((0,), 2, host=1))
    assert saver.store.divided and saver.store.appear_seconds > 30
    ranks.save_all(1)
    assert saver.store.steps() == [] and not (tmp_path / waiting_name(1, generation=3)).exists()
    ((name, fields),) = ranks.notes()
    assert name == KEPT and (fields["host"], fields["disks"], fields["needed"]) == (1, 2, [])
    folder = tmp_path / divided_name(1, generation=3, host=1)
    assert fields["manifest"] == manifest_hash(folder) and not save_damage(folder)
    saver.divide(None)
    ranks.save_all(2)
    assert not saver.store.divided and names(ranks.notes()) == ["saved"]


@pytest.mark.slow
def test_each_rank_killed_at_every_operation(tmp_path: Path) -> None:
    script = [sys.executable, background.__file__, str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    first, second = map(int, done.stdout.split())
    # make, write, fsync, (rename, remove) or (report): what a part and a manifest are made of
    assert first >= 14 and second >= 9


# --- the loop is not held up


@pytest.mark.timed
def test_a_slow_disk_does_not_hold_up_the_loop(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, size=1, files={0: SlowFiles(0.05)})
    began = time.monotonic()
    ranks.save_all(1, wait=False)
    stall = time.monotonic() - began
    assert Store(tmp_path).steps() == [], "not visible before it is whole"
    assert ranks.savers[0].wait(timeout_seconds=20)
    whole = time.monotonic() - began
    assert newest(tmp_path) == 1
    assert whole > 0.5, "some ten operations of 0.05 s"
    assert stall < 0.05 and ranks.savers[0].stall_seconds[0] < 0.05, "less than a single one"
    ((name, fields),) = ranks.notes()
    assert name == "saved" and fields["seconds"] > 0.5 and fields["stall_seconds"] < 0.05


def test_a_save_still_under_way_is_waited_for_and_said(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, size=1, files={0: SlowFiles(0.02)})
    ranks.save_all(1, wait=False)
    ranks.save_all(2)
    assert Store(tmp_path).steps() == [1, 2] and newest(tmp_path) == 2
    notes = ranks.notes()
    assert names(notes) == ["saved", "save-waited", "saved"]
    assert "step 2 waited" in text(notes[1:2]) and "larger checkpoint.every_steps" in text(
        notes[1:2]
    )
    assert ranks.savers[0].num_waits == 1
    assert 0.1 < ranks.savers[0].stall_seconds[1] < 5


@pytest.mark.timed
def test_the_wait_has_an_end_and_then_a_save_is_left_out(tmp_path: Path) -> None:
    """The disk hangs: the loop loses its patience, not its step; later it saves again."""
    slow = SlowFiles(0.3)
    ranks = Ranks(tmp_path, size=1, files={0: slow}, patience_seconds=0.1)
    ranks.save_all(1, wait=False)
    began = time.monotonic()
    ranks.save_all(2, wait=False)
    assert time.monotonic() - began < 0.3
    assert "step 2 is not saved" in text(ranks.notes())
    slow.seconds = 0.0
    ranks.savers[0].wait(timeout_seconds=20)
    assert Store(tmp_path).steps() == [1] and newest(tmp_path) == 1
    ranks.save_all(3)
    assert Store(tmp_path).steps() == [1, 3] and newest(tmp_path) == 3


def test_a_rank_that_never_delivers_is_given_up_at_the_next_save(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, patience_seconds=0.1)
    ranks.save_all(1)
    ranks.save(2, rank=0)  # rank 1 hangs elsewhere
    assert not ranks.savers[0].wait(timeout_seconds=0.1)
    ranks.save_all(3)
    assert Store(tmp_path).steps() == [1, 3] and newest(tmp_path) == 3
    notes = ranks.notes()
    assert sorted(names(notes)) == ["save-failed", "save-waited", "saved", "saved"]
    assert any("the part of rank 1 did not come" in str(fields.get("text")) for _, fields in notes)


# --- never early, never another's


def test_no_checkpoint_without_every_part(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path)
    ranks.save_all(1)
    ranks.save(2, rank=0)
    time.sleep(0.2)
    assert Store(tmp_path).steps() == [1]
    ranks.savers[0].leave()  # rank 1 is dead: the membership changes
    ranks.savers[0].wait(timeout_seconds=5)
    ranks.save(2, rank=1)  # its part comes, too late
    ranks.savers[1].wait(timeout_seconds=5)
    assert Store(tmp_path).steps() == [1] and newest(tmp_path) == 1


def test_a_part_that_comes_after_the_ranks_changed_is_not_published(tmp_path: Path) -> None:
    """Rank 0 is past its own part when it learns that the generation is over."""
    ranks = Ranks(tmp_path)
    ranks.save(2, rank=1)
    ranks.savers[1].wait(timeout_seconds=5)
    files = ranks.savers[0].store.files = SlowFiles(0.05)
    ranks.save(2, rank=0)
    ranks.savers[0].leave()
    ranks.savers[0].wait(timeout_seconds=10)
    assert files.seconds and Store(tmp_path).steps() == []
    assert "given up, for the workers changed" in text(ranks.notes())


def test_what_a_dead_attempt_left_is_no_part_of_a_new_save(tmp_path: Path) -> None:
    """The dead attempt's rank 1 had written and reported the very same step."""
    dead = Ranks(tmp_path, token="dead")
    dead.save(2, rank=1)
    dead.savers[1].wait(timeout_seconds=5)
    left = Store(tmp_path).writing(2, token="dead")
    assert (left / "rank-00001.report").is_file()
    ranks = Ranks(tmp_path, token="beef")
    ranks.save(2, rank=0)
    time.sleep(0.2)
    assert Store(tmp_path).steps() == [], "waits for its own rank 1"
    ranks.save(2, rank=1)
    ranks.savers[0].wait(timeout_seconds=5)
    assert newest(tmp_path) == 2 and not left.exists()


def test_a_fast_rank_may_be_a_save_ahead(tmp_path: Path) -> None:
    """What rank 1 wrote for the next save is not taken for a leftover by a slow rank 0."""
    ranks = Ranks(tmp_path, files={0: SlowFiles(0.05)})
    ranks.save(1, rank=0)
    for step in (1, 2):
        ranks.save(step, rank=1)
        ranks.savers[1].wait(timeout_seconds=5)
    ranks.save(2, rank=0)
    ranks.savers[0].wait(timeout_seconds=10)
    assert Store(tmp_path).steps() == [1, 2] and newest(tmp_path) == 2


@pytest.mark.parametrize(
    "change",
    [{"token": "0"}, {"step": 1}, {"rank": 0}, "size"],
    ids=str,
)
def test_a_report_that_does_not_fit_is_refused(tmp_path: Path, change: Any) -> None:
    ranks = Ranks(tmp_path)
    ranks.save(2, rank=1)
    ranks.savers[1].wait(timeout_seconds=5)
    folder = Store(tmp_path).writing(2, token="aaaa")
    path = folder / "rank-00001.report"
    report = json.loads(path.read_text())
    if change == "size":
        os.truncate(folder / "rank-00001.safetensors", 100)
    else:
        path.write_text(json.dumps({**report, **change}))
    ranks.save(2, rank=0)
    ranks.savers[0].wait(timeout_seconds=5)
    notes = ranks.notes()
    assert names(notes) == ["save-failed"], notes
    assert Store(tmp_path).steps() == []


# --- a disk that fails


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("fault", "said"), [("full", "no space left on the disk"), ("io", "Input/output error")]
)
def test_a_failed_save_is_said_and_the_next_one_tried(
    tmp_path: Path, rank: int, fault: str, said: str
) -> None:
    counting = FaultyFiles()
    Ranks(tmp_path / "count", files={rank: counting}).save_all(3)
    for at in range(counting.count):
        folder = tmp_path / f"at-{at}"
        ranks = Ranks(folder)
        ranks.save_all(1)
        ranks.notes()
        ranks.savers[rank].store.files = FaultyFiles(at=at, fault=fault)
        ranks.save(3, rank=1 - rank)
        ranks.save(3, rank=rank)
        for saver in reversed(ranks.savers):
            if not saver.wait(timeout_seconds=1):
                saver.leave(token="aaaa")  # rank 1 could not even leave a report
                saver.wait(timeout_seconds=5)
        notes = ranks.notes()
        if names(notes) != ["saved"]:  # the fault may come after the checkpoint has its name
            assert names(notes) == ["save-failed"]
            tried = "the next save tries again; the checkpoints before it are as they were"
            assert tried in text(notes)
            assert said in text(notes) or "no room to say why" in text(notes), (at, notes)
        assert newest(folder) in (1, 3)
        ranks.savers[rank].store.files = Files()
        ranks.save_all(4)
        assert newest(folder) == 4, f"operation {at}"
        assert names(ranks.notes()) == ["saved"]


def test_the_last_save_is_waited_for_and_its_failure_is_an_error(tmp_path: Path) -> None:
    slow = SlowFiles(0.02)
    saver = Saver(Store(tmp_path, files=slow), keep=3, background=True)

    def save(step: int, *, last: bool) -> None:
        group, facts = ProcessGroup(), {"progress": {"step": step}}
        saver.save(
            state_of(step), group=group, step=step, facts=lambda: facts, layout=Layout(), last=last
        )

    save(1, last=False)
    save(2, last=True)
    assert Store(tmp_path).steps() == [1, 2] and newest(tmp_path) == 2
    saver.store.files = FaultyFiles(at=3, fault="full")
    with pytest.raises(RunError, match=r"step 3 could not be saved: no space left on the disk"):
        save(3, last=True)
    assert newest(tmp_path) == 2


def test_in_the_foreground_too_a_failed_save_does_not_end_the_run(tmp_path: Path) -> None:
    saver = Saver(Store(tmp_path), keep=2, background=False)

    def save(step: int) -> list[Note]:
        facts = {"progress": {"step": step}}
        saver.save(
            state_of(step), group=ProcessGroup(), step=step, facts=lambda: facts, layout=Layout()
        )
        return saver.notes()

    assert names(save(1)) == ["saved"]
    saver.store.files = FaultyFiles(at=5, fault="full")
    assert "no space left on the disk" in text(save(2))
    assert newest(tmp_path) == 1
    saver.store.files = Files()
    assert names(save(3)) == ["saved"] and newest(tmp_path) == 3


# --- the real command


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", [(), PROCESSES, THREADS], ids=["one", "processes", "threads"])
def test_a_run_saves_the_same_in_the_background(bench: Bench, kind: tuple[str, ...]) -> None:
    plain, behind = bench.run(*LENGTH, *kind), bench.run(*BEHIND, *kind)
    assert behind.digits == plain.digits and behind.weights == plain.weights
    saved = [row for row in read_lines(behind.path / "events.jsonl") if row["event"] == "saved"]
    assert [row["step"] for row in saved] == [5, 10, 15, 20]
    for step in (15, 20):
        wanted, found = (Store(run.path / "checkpoints").open(step) for run in (plain, behind))
        for what in ("parameter", "exp_avg", "exp_avg_sq"):
            for name in wanted.names(what):
                assert found.read(name, kind=what).equal(wanted.read(name, kind=what))
        same = ("progress", "data", "layout", "fingerprint", "model_config")
        assert all(
            found.state[key] == wanted.state[key]
            for key in same
            if key != "progress"  # holds seconds
        )
        assert found.state["progress"]["samples"] == wanted.state["progress"]["samples"]


def test_a_run_resumes_from_a_background_save(bench: Bench) -> None:
    straight = bench.run(*LENGTH, *PROCESSES)
    run = bench.train(*BEHIND, *PROCESSES, "train.stop_after_steps=10")
    bench.resume(run)
    assert run.digits == straight.digits and run.weights == straight.weights


@pytest.mark.slow
def test_the_whole_job_killed_while_it_saves_all_the_time(bench: Bench) -> None:
    """Every step is saved, so that a save is under way whenever the kill comes."""
    every = ("checkpoint.every_steps=1", "checkpoint.background=true")
    run = Run(bench.new_path())
    words = ("train", bench.recipe, *LENGTH[:2], *every, *SLOW, *PROCESSES)
    with started(*words, "--out", run.path) as process:
        wait_for_step(run, 9)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=20)
    store = Store(run.path / "checkpoints")
    newest_good = store.newest_good(on_bad=lambda step, why: pytest.fail(f"{step}: {why}"))
    assert newest_good >= 7, "at most the save under way and the step before it are missing"
    bench.resume(run)
    straight = bench.run(*LENGTH, *SLOW, *PROCESSES)
    assert run.digits == straight.digits and run.weights == straight.weights
