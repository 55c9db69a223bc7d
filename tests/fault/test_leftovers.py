"""One writer, and nothing in the way afterwards, whoever was stopped, killed or edits a file."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import alive, server_and_workers, started, wait_for_step, wait_until

from shoal.checkpoint.manifest import Manifest
from shoal.config.load import load_recipe
from shoal.errors import RunError
from shoal.launch import local, summary
from shoal.launch.local import Result, decision_before
from tiny import Bench, Run, shoal

LENGTH = ("train.steps=12", "train.evaluate_every_steps=0", "checkpoint.every_steps=5")
SLOW = ("train.steps=300", "train.micro_batch_samples=1", "train.evaluate_every_steps=0")
TWO = ("parallel.replicate=2", "launch.workers=processes")


def test_workers_whose_command_was_killed_end_though_their_server_is_stopped(bench: Bench) -> None:
    """They trained and saved on, beside those of the resume."""
    run = Run(bench.new_path())
    with started("train", bench.recipe, *SLOW, *TWO, "--out", run.path) as process:
        wait_for_step(run, 3)
        server, workers = server_and_workers(process.pid)
        os.kill(server, signal.SIGSTOP)
        os.kill(process.pid, signal.SIGKILL)
        wait_until(lambda: not alive(workers), what=f"the end of {workers}", seconds=15)
        assert alive([server]), "they ended by themselves, not with it"
        os.kill(server, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_only_ctrl_c_or_a_terminal_ends_at_once_when_asked_twice(
    bench: Bench, number: signal.Signals
) -> None:
    """A batch system sends SIGTERM twice, with time between for the save."""
    run = Run(bench.new_path())
    long_steps = ("train.global_batch_samples=128", "train.micro_batch_samples=1")
    with started("train", bench.recipe, *long_steps, "--out", run.path) as process:
        wait_for_step(run, 1)
        os.kill(process.pid, signal.SIGTERM)
        assert process.stdout is not None
        wait_until(lambda: "asked to stop" in process.stdout.readline(), what="the first answer")
        os.kill(process.pid, number)
        _, err = process.communicate(timeout=60)
    saved = list(run.path.glob("checkpoints/step-*/manifest.json"))
    if number == signal.SIGTERM:
        assert process.returncode == 75 and len(saved) == 1, err
    else:
        assert process.returncode == 1 and not saved, err


def test_a_kill_while_data_is_prepared_leaves_no_trap(bench: Bench) -> None:
    out = bench.new_path()
    with started("train", bench.recipe, *LENGTH, "--out", out) as process:
        wait_until(lambda: (out / ".lock").exists(), what="the lock")
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=20)
    assert [path.name for path in out.iterdir()] == [".lock"]
    with pytest.raises(RunError, match="expected a run directory"):
        bench.resume(Run(out))
    assert bench.train(*LENGTH, out=out).losses == bench.run(*LENGTH).losses


def test_a_start_that_fails_leaves_no_half_run(bench: Bench) -> None:
    """`train` would have seen a run there, and `resume` none."""
    out = bench.new_path()
    with started("train", bench.recipe, *LENGTH, "launch.retries=0", "--out", out) as process:
        found: list[int] = []
        wait_until(lambda: bool(found.extend(_workers(process.pid)) or found), what="a worker")
        os.kill(found[0], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "was killed (SIGKILL)" in err
    assert not out.exists(), "nothing was begun"


def _workers(command: int) -> list[int]:
    try:
        return server_and_workers(command)[1]
    except ValueError:  # no server yet
        return []


@pytest.mark.slow
def test_killed_before_its_first_save_it_begins_anew(bench: Bench) -> None:
    """`train` sends to `resume`, which can: one does not send back to the other."""
    run = Run(bench.new_path())
    slow = ("train.micro_batch_samples=1", "checkpoint.every_steps=0", "train.steps=12")
    slow += ("train.evaluate_every_steps=0",)
    with started("train", bench.recipe, *slow, "--out", run.path) as process:
        wait_for_step(run, 3)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=20)
    with pytest.raises(RunError, match=f"go on with it by 'shoal resume {run.path}'"):
        bench.train(*slow, out=run.path)
    done = bench.command("resume", run.path)
    assert done.returncode == 0, done.stderr
    assert "nothing was saved before it ended: beginning anew" in done.stdout
    assert run.digits == bench.run(*slow).digits


def test_a_finished_run_whose_saves_were_removed_is_not_trained_again(bench: Bench) -> None:
    run = bench.train("train.steps=2")
    for path in sorted(run.path.glob("checkpoints/**/*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(RunError, match="no checkpoint here; nothing to resume from"):
        bench.resume(run)
    assert len(run.losses) == 2 and (run.path / "model").is_dir()


def copied(bench: Bench) -> Run:
    """A run that stopped after step 7, all its own."""
    run = Run(bench.new_path())
    shutil.copytree(bench.run(*LENGTH, "train.stop_after_steps=7").path, run.path)
    return run


TAILS = [
    b"\xff\xfe\n",
    b"[1, 2]\n",
    b'{"step": null, "loss": 1.0}\n',
    b'{"step": "many", "event": "x"}\n',
    b'"words"\n7\nnull\n',
    b'{"step": 8, "lo',
    b"\x00\x00\x00\x00",
    b"[" * 100_000 + b"\n",
    b'{}\n{"loss": 1.0}\n{"step": 3, "loss": "x"}\n{"step": 3, "evaluation_loss": []}\n',
]


@pytest.mark.quick(4)
@pytest.mark.parametrize("tail", TAILS, ids=range(len(TAILS)))
def test_logs_with_an_odd_tail_do_not_stop_a_resume(bench: Bench, tail: bytes) -> None:
    run = copied(bench)
    for name in ("metrics.jsonl", "events.jsonl", "samples.jsonl"):
        with (run.path / name).open("ab") as file:
            file.write(tail)
    bench.resume(run)
    assert run.digits == bench.run(*LENGTH).digits
    assert (run.path / "summary.json").is_file() and (run.path / "loss.png").is_file()


PLANS = [
    "",
    "{",
    "[]",
    '"fast"',
    "7",
    "{}",
    '{"threads_per_worker": "two"}',
    '{"threads_per_worker": 0}',
    '{"micro_batch_samples": 3}',
    '{"micro_batch_samples": 0}',
    '{"layout": {"replicate": 2}}',
    '{"layout": {"replicate": "x"}}',
    '{"workers": "ponies"}',
    '{"compute": "float8"}',
    "[" * 100_000,
]


@pytest.mark.parametrize("edit", PLANS, ids=range(len(PLANS)))
def test_a_plan_edited_by_hand_is_not_taken(bench: Bench, edit: str) -> None:
    run, said = copied(bench), list[str]()
    recipe, path = load_recipe(str(run.path / "config.yaml")), run.path / "plan.json"
    assert decision_before(run.path, recipe, new=[], say=said.append) is not None and not said
    if edit.startswith("{") and edit.endswith("}") and edit != "{}":
        edit = json.dumps({**json.loads(path.read_text()), **json.loads(edit)})
    path.write_text(edit)
    assert decision_before(run.path, recipe, new=[], say=said.append) is None
    assert said[0].startswith(f"warning: {path} cannot be used (") and "deciding anew" in said[0]


def test_what_was_planned_is_decided_anew(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    run = copied(bench)
    path = run.path / "plan.json"
    path.write_text('"fast"')
    local.resume(run.path, console=True, pool=bench.pool)
    assert f"warning: {path} cannot be used (" in capsys.readouterr().out
    assert run.digits == bench.run(*LENGTH).digits
    assert json.loads(path.read_text())["micro_batch_samples"] > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": 99}, "its progress cannot be that of step 7"),
        ({"step": -1}, "its progress cannot be that of step 7"),
        ({"samples": 3}, "its progress cannot be that of step 7"),
        ({"applied_steps": 8}, "its progress cannot be that of step 7"),
        ({"tokens": -5}, "its progress cannot be that of step 7"),
        ({"seconds": math.nan}, "its progress cannot be that of step 7"),
        ({"step": "seven"}, "does not say where the run was"),
    ],
    ids=str,
)
def test_progress_that_cannot_be(bench: Bench, change: dict[str, object], said: str) -> None:
    """The checksum of a manifest is right whoever writes it."""
    run = copied(bench)
    folder = run.path / "checkpoints/step-00000007"
    manifest = Manifest.read(folder)
    manifest.state["progress"].update(change)
    (folder / "manifest.json").write_bytes(manifest.to_bytes())
    with pytest.raises(RunError, match=said):
        bench.resume(run)
    assert len(run.losses) == 7


def test_a_checkpoint_beyond_the_end_of_the_run(bench: Bench) -> None:
    """It counted as finished."""
    run = copied(bench)
    with pytest.raises(RunError, match=r"is of step 7, but the run has 4 steps; give train.steps"):
        bench.resume(run, "train.steps=4", "train.schedule={kind: constant}")


def test_a_picture_that_cannot_be_drawn_costs_only_the_picture(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = bench.new_path()

    def broken(*arguments: object, **keywords: object) -> None:
        raise ImportError("libfreetype.so: cannot open shared object file")

    monkeypatch.setattr(summary, "plot_run", broken)  # what a machine may lack
    result = local.train(bench.recipe, LENGTH, out=out, console=True, pool=bench.pool)
    said = capsys.readouterr().out
    assert f"warning: {out / 'loss.png'} could not be drawn: ImportError: libfreetype" in said
    assert result.loss == Run(out).losses[-1] and (out / "summary.json").is_file()
    assert "picture" not in "\n".join(summary.last_words(out, result.summary, recipe="tiny"))


def test_a_last_loss_that_was_not_finite_is_nan() -> None:
    assert math.isnan(Result(Path("run"), {"final_loss": None}).loss)


@pytest.mark.slow
def test_a_killed_merge_leaves_nothing_behind_the_next(bench: Bench, tmp_path: Path) -> None:
    run, out = bench.run(*LENGTH), tmp_path / "merged"
    code = (
        "import os, signal, shoal.models.export as export\n"
        "def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)\n"
        "export._copy_tokenizer = die\n"
        "from shoal.cli.main import main; main()"
    )
    words = ["merge", str(run.path), "--out", str(out)]
    killed = subprocess.run([sys.executable, "-c", code, *words], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".partial")
    old_umask = os.umask(0o077)
    try:
        subprocess.run(shoal(*words), check=True, timeout=60)
    finally:
        os.umask(old_umask)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert out.stat().st_mode & 0o777 == 0o700, "as the umask says"
    assert all(path.stat().st_mode & 0o077 == 0 for path in out.iterdir())


@pytest.mark.slow
def test_what_is_written_now_is_no_leftover(bench: Bench, tmp_path: Path) -> None:
    """Two merges at once into one folder: one is there in the end, whole, and no error of ours."""
    run, out = bench.run(*LENGTH), tmp_path / "merged"
    words = ["merge", str(run.path), "--out", str(out)]
    both = [subprocess.Popen(shoal(*words), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [(process.communicate(timeout=90)[1], process.returncode) for process in both]
    assert any(status == 0 for _, status in ends), ends
    assert all("Traceback" not in text for text, _ in ends), ends
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert (out / "model.safetensors").read_bytes() == (
        run.path / "model/model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_keys_of_a_killed_command_go_at_the_next_start(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)  # it is remembered
    (tmp_path / "shoal-of-another-program").mkdir()
    run = Run(bench.new_path())
    with started("train", bench.recipe, *SLOW, "--out", run.path) as process:
        wait_for_step(run, 2)
        (site,) = [path for path in tmp_path.glob("shoal-*") if (path / "keys").exists()]
        bench.train(*LENGTH)  # beside it: what somebody owns stays
        assert (site / "keys").exists()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=20)
    assert (site / "keys").exists()
    bench.train(*LENGTH)
    assert [path.name for path in tmp_path.glob("shoal-*")] == ["shoal-of-another-program"]
