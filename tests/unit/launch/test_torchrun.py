"""Under torchrun the same command joins as one worker, and gives the same losses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoal.environment import usable_cores
from shoal.observe.events import read_lines
from tiny import Bench, Run, write_corpus

SHORT = ("train.steps=4", "train.evaluate_every_steps=0", "train.micro_batch_samples=4")


def torchrun(bench: Bench, *words: str) -> subprocess.CompletedProcess[str]:
    """Two workers of torchrun, each `shoal train tiny words...`."""
    shoal = Path(sys.executable).parent / "shoal"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, "--no-python", str(shoal), "train", str(bench.recipe), *SHORT, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


@pytest.mark.slow
def test_two_workers_join(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "joined"
    found = torchrun(bench, "parallel.replicate=2", "--out", str(out))
    assert found.returncode == 0, found.stderr
    assert "2 processes" in found.stdout
    wanted = bench.run(*SHORT, "parallel.replicate=2")
    assert Run(out).losses == wanted.losses
    assert (out / "summary.json").is_file() and (out / "model").is_dir()


@pytest.mark.slow
def test_another_number_is_refused(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "refused"
    found = torchrun(bench, "parallel.replicate=4", "--out", str(out))
    assert found.returncode != 0
    assert "the recipe says 4 replicas, torchrun started 2 workers" in found.stderr
    assert not out.exists()


@pytest.mark.slow
def test_ranks_with_other_recipes_are_refused(bench: Bench, tmp_path: Path) -> None:
    """One message that names the difference, instead of a hang or a silent choice."""
    out = tmp_path / "refused"
    shoal = Path(sys.executable).parent / "shoal"
    words = f'train.steps=4 parallel.replicate=2 "seed=$RANK" --out {out}'
    script = f"exec {shoal} train {bench.recipe} {words}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, "--no-python", "sh", "-c", script]
    found = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert found.returncode != 0
    assert found.stderr.count("the ranks do not run the same thing") == 1
    assert "recipe.seed: rank 0 has 0, rank 1 has 1" in found.stderr
    assert not out.exists()


@pytest.mark.slow
def test_a_run_is_resumed_by_the_workers_that_join(bench: Bench, tmp_path: Path) -> None:
    """Each would otherwise start a run of its own and be refused by the lock of the first."""
    run = bench.train(*SHORT, "parallel.replicate=1", "train.stop_after_steps=2")
    shoal = Path(sys.executable).parent / "shoal"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, "--no-python", str(shoal), "resume", str(run.path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert found.returncode == 0, found.stderr
    assert "2 processes" in found.stdout and "resuming" in found.stdout
    wanted = bench.run(*SHORT, "parallel.replicate=2").losses
    assert run.losses == pytest.approx(wanted, rel=1e-5)
    assert [row["step"] for row in run.rows if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_degree_that_was_given_must_be_the_number_of_workers(bench: Bench) -> None:
    run = bench.train(*SHORT, "parallel.replicate=1", "train.stop_after_steps=2")
    shoal = Path(sys.executable).parent / "shoal"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = ["resume", str(run.path), "parallel.replicate=4"]
    command = [*launcher, "--no-python", str(shoal), *words]
    found = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert found.returncode != 0
    assert "the recipe says 4 replicas, torchrun started 2 workers" in found.stderr


ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


def joined_alone() -> dict[str, str]:
    """The environment of one worker that a launcher has started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {**os.environ, **ALONE, "MASTER_PORT": str(port)}


FAILING = """
import os, signal, sys
import shoal.engine.begin as begin
from shoal.errors import DataError
build = begin.build
def failing(*words, **named):
    if os.environ["RANK"] == "1":
        if {killed}:
            os.kill(os.getpid(), signal.SIGKILL)
        raise DataError("/elsewhere: no prepared data here")
    return build(*words, **named)
begin.build = failing
from shoal.cli.main import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "killed",
    [pytest.param(False, marks=pytest.mark.slow), True],
    ids=["cannot read the data", "killed"],
)
def test_a_peer_lost_while_ranks_enter_ends_the_run_with_a_reason_on_each(
    bench: Bench, tmp_path: Path, killed: bool
) -> None:
    """A second host with a cache of its own was enough for a loop without an end."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(killed=killed))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = ["train", str(bench.recipe), *SHORT, "parallel.replicate=2", "--out"]
    command = [*launcher, str(script), *words, str(tmp_path / "run")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert found.returncode != 0
    if not killed:
        assert "shoal: worker 1: /elsewhere: no prepared data here" in found.stderr
    assert "shoal: worker 0: PeersLost: " in found.stderr


@pytest.mark.slow
def test_a_warning_of_the_launcher_ends_no_worker(bench: Bench, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    shoal = Path(sys.executable).parent / "shoal"
    slow = ("train.steps=30", "train.micro_batch_samples=1", "train.evaluate_every_steps=0")
    command = [str(shoal), "train", str(bench.recipe), *slow, "--out", str(run.path)]
    with subprocess.Popen(
        command, env=joined_alone(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not run.losses and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "most recent call first" in err and len(run.losses) == 30


@pytest.mark.slow
def test_the_same_line_starts_and_goes_on(bench: Bench, tmp_path: Path) -> None:
    """What an engine that runs the same line again needs."""
    run = Run(tmp_path / "run")
    shoal = Path(sys.executable).parent / "shoal"
    line = [str(shoal), "train", str(bench.recipe), *SHORT, "--go-on", "--out", str(run.path)]
    for more in (["train.stop_after_steps=2"], ["train.optimizer.learning_rate=2.0e-3"]):
        done = subprocess.run(
            [*line, *more], env=joined_alone(), capture_output=True, text=True, timeout=100
        )
        assert done.returncode == 0, done.stderr
    assert [row["step"] for row in run.rows if "loss" in row] == [1, 2, 3, 4]
    assert "changed: train.optimizer.learning_rate 0.003 -> 0.002" in done.stdout
    events = read_lines(run.path / "events.jsonl")
    changed = {row["key"]: row["after"] for row in events if row["event"] == "changed"}
    assert changed == {"train.optimizer.learning_rate": 0.002, "train.stop_after_steps": None}
    assert "learning_rate: 0.002" in (run.path / "config.yaml").read_text()


@pytest.mark.slow
def test_other_data_is_refused_there_too(bench: Bench, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "own.jsonl")
    run = bench.train(*SHORT, f"data.source={corpus}", "train.stop_after_steps=2")
    write_corpus(corpus, seed=7)
    shoal = Path(sys.executable).parent / "shoal"
    for more, status in (([], 2), (["--data-changed"], 0)):
        command = [str(shoal), "resume", str(run.path), *more]
        done = subprocess.run(
            command, env=joined_alone(), capture_output=True, text=True, timeout=100
        )
        assert done.returncode == status, done.stderr
    assert len(run.losses) == 4


@pytest.mark.slow
def test_a_run_that_diverges_says_so_there_too(bench: Bench, tmp_path: Path) -> None:
    shoal = Path(sys.executable).parent / "shoal"
    wild = ("train.optimizer={kind: sgd, learning_rate: 10.0}", "train.max_gradient_norm=null")
    wild += ("train.steps=20", "train.schedule={kind: constant}", "train.divergence_steps=4")
    command = [str(shoal), "train", str(bench.recipe), *wild, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, env=joined_alone(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "above its start" in done.stderr


@pytest.mark.slow
def test_the_host_with_fewest_cores_decides(bench: Bench, tmp_path: Path) -> None:
    """Two hosts of one worker each, as it were; the second lets it run on one core."""
    if usable_cores() < 2:
        pytest.skip("needs a second core")
    shoal = Path(sys.executable).parent / "shoal"
    words = f"{bench.recipe} {' '.join(SHORT)} launch.threads_per_worker=auto parallel.replicate=2"
    line = f"{shoal} train {words} --out {tmp_path / 'run'}"
    core = min(os.sched_getaffinity(0))
    script = (
        f"export LOCAL_WORLD_SIZE=1; [ $RANK = 0 ] && exec {line}; exec taskset -c {core} {line}"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, "--no-python", "sh", "-c", script]
    found = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert found.returncode == 0, found.stderr
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert plan["threads_per_worker"] == 1
