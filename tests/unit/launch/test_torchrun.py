"""Under torchrun the same command joins as one worker, and gives the same losses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tiny import Bench, Run

SHORT = ("train.steps=4", "train.evaluate_every_steps=0", "train.micro_batch_samples=4")


def torchrun(bench: Bench, *words: str) -> subprocess.CompletedProcess[str]:
    """Two workers of torchrun, each `shoal train tiny words...`."""
    shoal = Path(sys.executable).parent / "shoal"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, "--no-python", str(shoal), "train", str(bench.recipe), *SHORT, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


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
