"""Run directories: new ones are new, and a name is taken only by one."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from shoal.errors import RunError
from shoal.launch.directory import claim, open_run, write_whole


def test_numbers_go_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = claim(None, name="quickstart"), claim(None, name="quickstart")
    assert [str(first), str(second)] == ["runs/quickstart-001", "runs/quickstart-002"]
    assert first.is_dir() and second.is_dir()


def test_runs_started_at_once_get_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    taken: list[Path] = []
    threads = [
        threading.Thread(target=lambda: taken.append(claim(None, name="run"))) for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(taken)) == 12


def test_an_empty_folder_may_be_given(tmp_path: Path) -> None:
    assert claim(tmp_path / "new/deep", name="x").is_dir()
    assert claim(tmp_path / "new/deep", name="x") == tmp_path / "new/deep"


@pytest.mark.parametrize("mark", ["config.yaml", "metrics.jsonl", "checkpoints"])
def test_any_mark_of_a_run_protects_it(tmp_path: Path, mark: str) -> None:
    (tmp_path / mark).touch()
    with pytest.raises(RunError, match=r"already holds a run.*shoal resume"):
        claim(tmp_path, name="x")


def test_a_run_is_opened_by_its_recipe(tmp_path: Path) -> None:
    (tmp_path / "run-001").mkdir()
    (tmp_path / "run-001/config.yaml").touch()
    assert open_run(tmp_path / "run-001") == tmp_path / "run-001"
    with pytest.raises(RunError, match="no such run; did you mean 'run-001'"):
        open_run(tmp_path / "run-01")


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_whole(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "half \ud800")
    assert path.read_text() == "first"
    assert [found.name for found in tmp_path.iterdir()] == ["plan.json"]
