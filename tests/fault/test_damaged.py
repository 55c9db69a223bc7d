"""Disks that really are full or read-only, files that were changed, two jobs in one run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import saves
from background import Ranks, newest, state_of
from processes import started, wait_for_step

from shoal.checkpoint.store import Store
from shoal.comm.group import ProcessGroup
from shoal.engine.saving.saver import Note, Saver
from shoal.errors import CheckpointError
from shoal.layout import Layout
from tiny import Bench, Run

# --- real disks


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; skips the test where this user may not mount one."""
    path.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def save(saver: Saver, step: int) -> list[Note]:
    """One save of one rank, waited for; what it has to tell."""
    saver.save(
        state_of(step),
        group=ProcessGroup(),
        step=step,
        layout=Layout(),
        facts=lambda: {"progress": {"step": step}},
    )
    assert saver.wait(timeout_seconds=20)
    return saver.notes()


def kind_and_text(notes: list[Note]) -> tuple[str, str]:
    ((name, fields),) = notes
    return name, str(fields.get("text"))


BOTH = pytest.mark.parametrize("behind", [False, True], ids=["foreground", "background"])


@BOTH
def test_a_disk_that_fills_up_and_is_cleared_again(tmp_path: Path, behind: bool) -> None:
    with small_disk(tmp_path / "disk") as disk:
        run = disk / "checkpoints"
        saver = Saver(Store(run), keep=2, background=behind)
        assert kind_and_text(save(saver, 1))[0] == "saved"
        with (disk / "filler").open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
        for step in (2, 3):
            name, text = kind_and_text(save(saver, step))
            assert name == "save-failed" and "no space left on the disk" in text
            assert str(run) in text and "the next save tries again" in text
            assert newest(run) == 1
        (disk / "filler").unlink()
        assert kind_and_text(save(saver, 4))[0] == "saved" and newest(run) == 4
        left = [path.name for path in run.iterdir() if path.name.startswith(".")]
        assert left == [], "what the failed ones had written gave its room back"


@BOTH
def test_a_disk_that_becomes_read_only(tmp_path: Path, behind: bool) -> None:
    with small_disk(tmp_path / "disk") as disk:
        saver = Saver(Store(disk / "checkpoints"), keep=2, background=behind)
        save(saver, 1)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        name, text = kind_and_text(save(saver, 2))
        assert name == "save-failed" and "the file system can only be read" in text
        assert newest(disk / "checkpoints") == 1
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert kind_and_text(save(saver, 3))[0] == "saved"


@pytest.mark.skipif(os.geteuid() == 0, reason="this user may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    saver = Saver(Store(tmp_path), keep=2)
    save(saver, 1)
    tmp_path.chmod(0o500)
    try:
        assert "Permission denied" in kind_and_text(save(saver, 2))[1]
        assert newest(tmp_path) == 1
    finally:
        tmp_path.chmod(0o700)


LIMITED = """
import resource, sys
from pathlib import Path
from shoal.checkpoint.store import Store
from shoal.engine.saving.saver import Saver
from test_damaged import kind_and_text, newest, save

folder = Path(sys.argv[1])
for behind in (False, True):
    run = folder / str(behind)
    saver = Saver(Store(run), keep=2, background=behind)
    save(saver, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))
    name, text = kind_and_text(save(saver, 2))
    assert name == "save-failed" and "larger than this system allows (ulimit -f)" in text, text
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert newest(run) == 1
    assert kind_and_text(save(saver, 3))[0] == "saved" and newest(run) == 3
"""


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    places = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


# --- files that are not what they were

FILE = "rank-00000.safetensors"


def exchange_ranks(folder: Path) -> str:
    """Two files of one checkpoint under each other's name."""
    one, other = folder / FILE, folder / "rank-00001.safetensors"
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)
    return str(one)


def of_another_step(folder: Path) -> str:
    """A part of the step before, of the very same size."""
    shutil.copy(folder.parent / "step-00000001" / FILE, folder / FILE)
    return str(folder / FILE)


def manifest_of_another_step(folder: Path) -> str:
    """Everything of step 1 under the name of step 2: whole, and the wrong one."""
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "step-00000001", folder)
    return f"{folder}/manifest.json: is of step 1, expected 2"


def a_link_to_the_same_bytes(folder: Path) -> str:
    (folder / FILE).rename(folder.parent.parent / "elsewhere")
    (folder / FILE).symlink_to(folder.parent.parent / "elsewhere")
    return f"{folder / FILE}: cannot be read: is a link, expected a file"


def a_link_without_end(folder: Path) -> str:
    (folder / FILE).unlink()
    (folder / FILE).symlink_to("/dev/zero")
    return f"{folder / FILE}: cannot be read: is a link"


def a_pipe(folder: Path) -> str:
    """Opening one would wait for a writer for ever."""
    (folder / FILE).unlink()
    os.mkfifo(folder / FILE)
    return f"{folder / FILE}: cannot be read: is no regular file"


def a_folder(folder: Path) -> str:
    (folder / FILE).unlink()
    (folder / FILE).mkdir()
    return f"{folder / FILE}: cannot be read"


def a_manifest_that_is_a_link(folder: Path) -> str:
    (folder / "manifest.json").rename(folder.parent.parent / "elsewhere")
    (folder / "manifest.json").symlink_to(folder.parent.parent / "elsewhere")
    return f"{folder}/manifest.json: cannot be read: is a link"


def a_checkpoint_that_is_a_link(folder: Path) -> str:
    folder.rename(folder.parent.parent / "elsewhere")
    folder.symlink_to(folder.parent.parent / "elsewhere")
    return f"{folder}: is a link, expected the folder of a checkpoint"


def without_permission(folder: Path) -> str:
    (folder / FILE).chmod(0)
    return f"{folder / FILE}: cannot be read: Permission denied"


CHANGES = (
    exchange_ranks,
    of_another_step,
    manifest_of_another_step,
    a_link_to_the_same_bytes,
    a_link_without_end,
    a_pipe,
    a_folder,
    a_manifest_that_is_a_link,
    a_checkpoint_that_is_a_link,
    *(() if os.geteuid() == 0 else (without_permission,)),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_it_is_named_and_the_one_before_is_used(
    tmp_path: Path, change: Callable[[Path], str]
) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        saves.save(folder, step)
    expected = change(folder / "step-00000002")
    said: list[tuple[int, str]] = []
    assert Store(folder).newest_good(on_bad=lambda *found: said.append(found)) == 1
    ((step, reason),) = said
    assert step == 2 and reason.startswith(expected), reason
    saves.save(folder, 3)
    assert saves.newest(folder) == 3, "and saving goes on beside it"


def test_what_changes_between_the_check_and_the_reading_is_noticed(tmp_path: Path) -> None:
    for step in (1, 2):
        saves.save(tmp_path, step)
    reader = Store(tmp_path).open(2)
    exchange_ranks(tmp_path / "step-00000002")
    with pytest.raises(CheckpointError, match="rank-00000"):
        reader.read("bias", kind="exp_avg")
    with pytest.raises(CheckpointError, match="rank-0000"):
        reader.read("weight")


def test_leftovers_of_any_kind_do_not_stop_a_save(tmp_path: Path) -> None:
    """What a dead job, or somebody's mistake, left under the names of saves under way."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").touch()
    (tmp_path / ".step-00000001.writing").symlink_to(tmp_path / "precious")
    (tmp_path / ".step-00000002.dead.writing").write_text("a file")
    (tmp_path / ".step-00000003.writing/deep").mkdir(parents=True)
    Ranks(tmp_path).save_all(1)
    saves.save(tmp_path, 2)
    assert saves.newest(tmp_path) == 2
    assert [path.name for path in tmp_path.glob(".step-*")] == []
    assert (tmp_path / "precious/file").exists(), "the link went, not what it led to"


# --- two jobs in one run


@pytest.mark.slow
def test_a_second_job_in_the_same_run_is_refused_at_once(bench: Bench) -> None:
    run = Run(bench.new_path())
    words = ("train.steps=100000", "checkpoint.every_steps=0", "train.evaluate_every_steps=0")
    with started("train", bench.recipe, *words, "--out", run.path) as process:
        wait_for_step(run, 5)
        second = bench.command("resume", run.path)
        assert second.returncode == 2 and process.poll() is None
        assert f"process {process.pid} is at work in this run" in second.stderr
        assert "Traceback" not in second.stderr
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 75, err
    assert run.events.count("started") == 1 and "resumed" not in run.events
    assert not (run.path / ".lock").exists()
