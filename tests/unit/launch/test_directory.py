"""Run directories: new ones are new, and a name is taken only by one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shoal.config.load import load_recipe
from shoal.errors import RunError
from shoal.launch.directory import claim, hold, open_run, write_whole
from shoal.launch.local import decision_before
from shoal.page.shelf import is_active


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


def test_a_run_is_held_by_one_process(tmp_path: Path) -> None:
    with hold(tmp_path):
        who = f"process {os.getpid()} is at work in this run"
        with pytest.raises(RunError, match=who), hold(tmp_path):
            pass
        with pytest.raises(RunError, match="another --out"), hold(tmp_path):
            pass
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("socket.gethostname", lambda: "h2")
        with hold(tmp_path):
            patched.setattr("socket.gethostname", lambda: "h1")
            who = f"process {os.getpid()} of h2 is at work in this run"
            with pytest.raises(RunError, match=who), hold(tmp_path):
                pass
    with hold(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == [], "a folder with nothing in it can go again"


HOLDER = """
import sys, time
from pathlib import Path
from shoal.launch.directory import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    try:
        with pytest.raises(RunError, match=f"process {process.pid} is"), hold(tmp_path):
            pass
    finally:
        process.kill()
        process.communicate()
    left = (tmp_path / ".lock").read_text()
    assert left.split() == [str(process.pid), socket.gethostname()], "left behind, and no obstacle"
    with hold(tmp_path):
        assert (tmp_path / ".lock").read_text().split()[0] == str(os.getpid())
        assert is_active(tmp_path), "the page reads it too"


def test_many_at_once_hold_one_after_another(tmp_path: Path) -> None:
    """The file is removed and made anew all the time; two never hold it together."""
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        done = 0
        while done < 20:
            try:
                with hold(tmp_path):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
                    done += 1
            except RunError:
                continue

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 80 and max(most) == 1


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(tmp_path / "other")
    with pytest.raises(RunError, match=r"\.lock: cannot be written"), hold(tmp_path / "run"):
        pass
    assert (tmp_path / "other").read_text() == "precious"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '"x"', "{}", '{"layout": []}', '{"layout": 3}']
)
def test_a_plan_that_was_edited_by_hand_is_made_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    said: list[str] = []
    found = decision_before(tmp_path, load_recipe("quickstart"), new=[], say=said.append)
    assert found is None and said[0].startswith(f"warning: {tmp_path / 'plan.json'} cannot be used")
