"""The commands of runs over several hosts: what they print, ask for and refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal.cli.main import main
from shoal.launch.directory import hold, hosts_to_drain, requests_in


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command in this process: (exit status, what it printed, what it complained of)."""

    def run(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    return tmp_path


def test_a_run_is_asked_by_files_in_its_folder(told: Any, run: Path) -> None:
    with hold(run):
        assert told("stop", run)[:2] == (
            0,
            f"asked {run} to save and stop; go on with: shoal resume {run}\n",
        )
        assert told("save", run)[:2] == (0, f"asked {run} to save\n")
        assert told("drain", "h3", run)[:2] == (0, f"asked {run} to do without h3\n")
    assert requests_in(run) == ["STOP", "SAVE"] and hosts_to_drain(run) == ["h3"]
    assert requests_in(run) == hosts_to_drain(run) == []


@pytest.mark.parametrize("words", [("stop",), ("save",), ("drain", "h3")])
def test_a_run_at_which_nobody_works_is_asked_nothing(
    told: Any, run: Path, words: tuple[str, ...]
) -> None:
    status, _, error = told(*words, run)
    assert status == 2 and f"{run}: nobody is at work in this run" in error
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml"]


@pytest.mark.parametrize(
    ("variable", "command", "advice"),
    [
        ("SLURM_STEP_NUM_TASKS", "train", "shoal launch slurm"),
        ("OMPI_COMM_WORLD_SIZE", "train", "shoal launch mpi"),
        ("PMI_SIZE", "resume", "shoal launch mpi"),
    ],
)
def test_copies_that_would_each_train_alone_are_refused(
    told: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    command: str,
    advice: str,
) -> None:
    monkeypatch.setenv(variable, "2")
    monkeypatch.chdir(tmp_path)
    status, _, error = told(command, "quickstart")
    assert status == 2 and f"{variable}=2: this command was started 2 times" in error
    assert advice in error and not list(tmp_path.iterdir())


def test_a_coordinator_is_one_process(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, error = told("launch", "hosts", "quickstart", "--hosts", "h", "--keys", "k")
    assert status == 2 and "RANK and WORLD_SIZE are set" in error


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "--hosts: expected a file with a line HOST or HOST:PORT"),
        (("--hosts", "h", "--go-on"), "--go-on: expected the run's directory"),
        (("--hosts", "gone"), "--hosts: gone cannot be read"),
    ],
)
def test_what_a_coordinator_needs(
    told: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, error = told("launch", "hosts", "quickstart", *words)
    assert status == 2 and text in error
    (tmp_path / "h").write_text("h1\n")
    more = ("--keys", "k", "--etcd", "http://127.0.0.1:1")
    status, _, error = told("launch", "hosts", "quickstart", "--hosts", "h", *more)
    assert status == 2 and "--etcd: expected the run's directory" in error


def test_what_to_type_is_printed(told: Any, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("h1\nh2:9\n")
    words = ("--hosts", hosts, "--keys", "K", "--out", "R", "--print", "train.steps=3")
    status, said, _ = told("launch", "hosts", "quickstart", *words)
    assert status == 0
    assert said.splitlines()[1] == "ssh h2 'shoal agent --listen h2 --port 9 --keys K' &"
    assert "shoal launch hosts quickstart train.steps=3 --hosts" in said.splitlines()[2]
    assert not (tmp_path / "K").exists()


def test_what_schedulers_get_is_printed(told: Any, tmp_path: Path) -> None:
    known = ("--out", "/runs/a", "--keys", "/keys/k")
    status, said, _ = told("launch", "slurm", "quickstart", *known, "--num-hosts", 2)
    assert status == 0 and said.startswith("#!/bin/bash\n#SBATCH --nodes=2")
    more = ("--num-hosts", 2, "--image", "i", "--claim", "c")
    status, said, _ = told("launch", "kubernetes", "quickstart", *known, *more)
    assert status == 0 and "completionMode: Indexed" in said
    status, said, _ = told("launch", "ray", "quickstart", *known, "--num-hosts", 2, "--cpus", 4)
    assert status == 0 and "NUM_HOSTS, CPUS, HOSTS = 2, 4, '/keys/k.hosts'" in said
    (tmp_path / "hosts").write_text("h1\nh2\n")
    status, said, _ = told("launch", "mpi", "quickstart", *known, "--hosts", tmp_path / "hosts")
    assert status == 0 and said.startswith("mpirun -n 2 ")


def test_an_agent_that_cannot_listen_says_so(told: Any, tmp_path: Path) -> None:
    status, _, error = told("agent", "--keys", tmp_path / "k", "--listen", "h1.nowhere")
    assert status == 2 and "--listen: h1.nowhere port 27465: cannot listen" in error
