"""The real command, killed and interrupted: what it says, what it leaves, how it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import alive, family, server_and_workers, started, wait_for_step, wait_until

from shoal.observe.events import read_lines
from tiny import Bench, Run

LENGTH = ("train.steps=20", "train.evaluate_every_steps=5", "checkpoint.every_steps=5")
# One sample a micro batch: a step takes long enough to be hit.
SLOW = (*LENGTH, "train.micro_batch_samples=1")
TWO = ("parallel.replicate=2", "launch.workers=processes")


def assert_nothing_left(pids: list[int]) -> None:
    wait_until(lambda: not alive(pids), what=f"the end of {pids}", seconds=15)


def assert_same_end(found: Run, wanted: Run) -> None:
    assert found.digits == wanted.digits
    assert found.weights == wanted.weights


def test_the_whole_job_killed_at_step_13(bench: Bench) -> None:
    run = Run(bench.new_path())
    with started("train", bench.recipe, *SLOW, *TWO, "--out", run.path) as process:
        wait_for_step(run, 13)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=20)
    bench.resume(run)
    events = read_lines(run.path / "events.jsonl")
    assert [row["step"] for row in events if row["event"] == "resumed"] == [10]
    assert_same_end(run, bench.run(*SLOW, *TWO))


@pytest.mark.parametrize(
    "how",
    [
        "SIGINT to the group",
        pytest.param("SIGTERM to the group", marks=pytest.mark.slow),
        pytest.param("SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_asked_to_stop_it_saves_and_says_how_to_go_on(bench: Bench, how: str) -> None:
    """A terminal sends Ctrl-C to the whole group; a batch system sends SIGTERM to either."""
    run = Run(bench.new_path())
    with started("train", bench.recipe, *SLOW, *TWO, "--out", run.path) as process:
        wait_for_step(run, 7)
        number = signal.SIGINT if "SIGINT" in how else signal.SIGTERM
        (os.killpg if "group" in how else os.kill)(process.pid, number)
        out, err = process.communicate(timeout=40)
    assert process.returncode == 75, err
    assert "asked to stop: saving after this step" in out
    assert f"go on with: shoal resume {run.path}" in err
    steps = len(run.losses)
    assert 7 <= steps < 20
    assert (run.path / f"checkpoints/step-{steps:08d}/manifest.json").is_file()
    bench.resume(run)
    assert_same_end(run, bench.run(*SLOW, *TWO))


@pytest.mark.slow
def test_a_thread_run_stops_too(bench: Bench) -> None:
    run = Run(bench.new_path())
    words = (*SLOW, "parallel.replicate=2", "launch.workers=threads")
    with started("train", bench.recipe, *words, "--out", run.path) as process:
        wait_for_step(run, 3)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=40)
    assert process.returncode == 75, err
    assert (run.path / f"checkpoints/step-{len(run.losses):08d}/manifest.json").is_file()


def test_a_second_interrupt_ends_at_once(bench: Bench) -> None:
    run = Run(bench.new_path())
    long_steps = ("train.global_batch_samples=1024", "train.micro_batch_samples=1")
    with started("train", bench.recipe, *long_steps, "--out", run.path) as process:
        wait_until(lambda: "started" in run.events, what="a start")
        left = list(family(process.pid))
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout is not None
        wait_until(lambda: "asked to stop" in process.stdout.readline(), what="the first answer")
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=15)
    assert process.returncode == 1, "nothing was saved, so there is nothing to resume"
    assert "stopped at once, before the first save" in err
    assert_nothing_left(left)


def test_interrupted_while_preparing(bench: Bench, tmp_path: Path) -> None:
    with started("train", bench.recipe, "--out", tmp_path / "run") as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1, err
    assert err.endswith("shoal: interrupted; nothing was begun or saved\n")
    assert not (tmp_path / "run").exists(), "the name is free again"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_is_named(bench: Bench, rank: int) -> None:
    run = Run(bench.new_path())
    words = (*SLOW, *TWO, "launch.retries=0", "--out", run.path)
    with started("train", bench.recipe, *words) as process:
        wait_for_step(run, 6)
        server, workers = server_and_workers(process.pid)
        assert len(workers) == 2
        os.kill(workers[rank], signal.SIGKILL)
        _, err = process.communicate(timeout=40)
    assert process.returncode == 1, err
    assert f"worker {rank} was killed (SIGKILL)" in err and "resume the run" in err
    assert "Traceback" not in err.partition("shoal: ")[2]
    assert_nothing_left([server, *workers])


@pytest.mark.slow
def test_a_worker_killed_by_a_stranger_is_replaced(bench: Bench) -> None:
    """Not a planned fault: nobody says so beforehand."""
    run = Run(bench.new_path())
    with started("train", bench.recipe, *SLOW, *TWO, "--out", run.path) as process:
        wait_for_step(run, 6)
        _, workers = server_and_workers(process.pid)
        os.kill(workers[1], signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "lost: worker 1 was killed (SIGKILL)" in out and "recovered: step" in out
    assert_same_end(run, bench.run(*SLOW, *TWO))


@pytest.mark.slow
def test_a_worker_killed_after_a_stop_was_asked_costs_no_step(bench: Bench) -> None:
    """The other holds the state: it takes the order on into the next generation, and saves."""
    run = Run(bench.new_path())
    with started("train", bench.recipe, *SLOW, *TWO, "--out", run.path) as process:
        wait_for_step(run, 7)
        _, workers = server_and_workers(process.pid)
        os.kill(workers[1], signal.SIGSTOP)  # so that it hears of the stop, but cannot end
        os.kill(process.pid, signal.SIGTERM)
        assert process.stdout is not None
        wait_until(lambda: "asked to stop" in process.stdout.readline(), what="the answer")
        os.kill(workers[1], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    steps = len(run.losses)
    assert 7 < steps < 20 and "lost" in run.events
    assert (run.path / f"checkpoints/step-{steps:08d}/manifest.json").is_file()
    bench.resume(run)
    assert_same_end(run, bench.run(*SLOW, *TWO))


def test_who_comes_after_the_others_have_stopped_begins_nothing(bench: Bench) -> None:
    """The lost worker's successor still starts when the rest saves and ends, as it was asked to."""
    run = Run(bench.new_path())
    words = (*SLOW, "parallel.replicate={min: 1, max: 2}", "train.steps=100000")
    with started("train", bench.recipe, *words, "--out", run.path) as process:
        wait_for_step(run, 7)
        _, workers = server_and_workers(process.pid)
        os.kill(workers[1], signal.SIGKILL)

        def successors() -> set[int]:
            return set(server_and_workers(process.pid)[1]) - set(workers)

        wait_until(successors, what="the successor")
        (successor,) = successors()
        os.kill(successor, signal.SIGSTOP)
        (run.path / "STOP").touch()
        assert_nothing_left(workers)
        os.kill(successor, signal.SIGCONT)
        _, err = process.communicate(timeout=40)
    assert process.returncode == 75, err
    assert "restarted" not in run.events and run.events.count("lost") == 1
    assert (run.path / f"checkpoints/step-{len(run.losses):08d}/manifest.json").is_file()


@pytest.mark.parametrize("how", ["STOP", pytest.param("time limit", marks=pytest.mark.slow)])
def test_other_ways_to_ask_for_an_end(bench: Bench, how: str) -> None:
    run = Run(bench.new_path())
    limit = ("launch.time_limit_seconds=0.1",) if how == "time limit" else ()
    with started("train", bench.recipe, *SLOW, *TWO, *limit, "--out", run.path) as process:
        if how == "STOP":
            wait_for_step(run, 3)
            (run.path / "STOP").touch()
        _, err = process.communicate(timeout=40)
    assert process.returncode == 75, err
    assert (run.path / f"checkpoints/step-{len(run.losses):08d}/manifest.json").is_file()
    assert not (run.path / "STOP").exists(), "else it would stop what is resumed"


@pytest.mark.slow
def test_the_file_save_saves_and_goes_on(bench: Bench) -> None:
    run = Run(bench.new_path())
    words = (*SLOW, *TWO, "checkpoint={every_steps: 0, keep_best: false}")
    words = (*words, "train.stop_after_steps=12")
    with started("train", bench.recipe, *words, "--out", run.path) as process:
        wait_for_step(run, 3)
        (run.path / "SAVE").touch()
        _, err = process.communicate(timeout=40)
    assert process.returncode == 0, err
    events = read_lines(run.path / "events.jsonl")
    saved = [row["step"] for row in events if row["event"] == "saved"]
    assert len(saved) == 2 and 3 <= saved[0] < 12 and saved[1] == 12


@pytest.mark.slow
def test_a_healthy_run_tells_where_everyone_is(bench: Bench) -> None:
    run = Run(bench.new_path())
    with started("train", bench.recipe, *SLOW, *TWO, "--out", run.path) as process:
        wait_for_step(run, 3)
        os.kill(process.pid, signal.SIGUSR1)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "worker 0: step" in out and "worker 1: step" in out
    assert out.count("stack of worker") == 2 and "trainer.py" in out
    assert_same_end(run, bench.run(*SLOW, *TWO))


@pytest.mark.parametrize(
    "who", ["the command", pytest.param("its fork server", marks=pytest.mark.slow)]
)
def test_no_worker_outlives(bench: Bench, who: str) -> None:
    run = Run(bench.new_path())
    with started("train", bench.recipe, *SLOW, *TWO, "--out", run.path) as process:
        wait_for_step(run, 3)
        server, workers = server_and_workers(process.pid)
        os.kill(process.pid if who == "the command" else server, signal.SIGKILL)
        assert_nothing_left([server, *workers])
        _, err = process.communicate(timeout=20)
    if who == "its fork server":
        assert process.returncode == 1, err
        assert "the fork server ended" in err


def test_who_leaves_is_noticed_whatever_it_keeps(tmp_path: Path) -> None:
    """A group that is referred to keeps its connections; a model that was cut refers to many."""
    script = Path(__file__).with_name("leaving.py")
    words = [sys.executable, script, tmp_path / "store"]
    with subprocess.Popen([*words, "1"]) as leaves:
        try:
            waits = subprocess.run([*words, "0"], capture_output=True, text=True, timeout=60)
        finally:
            leaves.kill()
    assert float(waits.stdout) < 2, waits.stderr
