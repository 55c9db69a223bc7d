"""TensorBoard and W&B are really written, and read back by their own readers."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from shoal.errors import UserError
from shoal.observe.plot import plot_run
from shoal.observe.trackers import TensorBoard, WandB
from tiny import Bench


def test_tensorboard_holds_what_the_run_logged(bench: Bench) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = bench.run("train.steps=4", "train.evaluate_every_steps=2", "observe.tensorboard=true")
    board = EventAccumulator(str(run.path / "tensorboard"))
    board.Reload()
    found = [(event.step, event.value) for event in board.Scalars("loss")]
    assert [step for step, _ in found] == [1, 2, 3, 4]
    assert [value for _, value in found] == pytest.approx(run.losses, rel=1e-6)
    assert [event.step for event in board.Scalars("evaluation_loss")] == [0, 2, 4]


def test_wandb_offline_holds_what_was_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sink = WandB(tmp_path, config={"seed": 3})
    sink.row({"step": 1, "loss": 2.5, "text": "left out"})
    sink.row({"step": 2, "loss": 2.25})
    sink.close()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 10  # another process writes it, a little after it was told to
    while b"2.25" not in file.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.02)
    content = file.read_bytes()
    assert b"loss" in content and b"2.25" in content and b"left out" not in content


@pytest.mark.parametrize(
    ("package", "make", "said"),
    [
        ("torch.utils.tensorboard", lambda run: TensorBoard(run), "observe.tensorboard"),
        ("wandb", lambda run: WandB(run, config={}), "observe.wandb"),
    ],
)
def test_a_board_that_is_not_installed(
    package: str, make: object, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    with pytest.raises(UserError, match=f"{said}: the package is not installed; pip install"):
        make(tmp_path)  # type: ignore[operator]


def test_a_picture_of_a_run(bench: Bench, tmp_path: Path) -> None:
    path = plot_run(bench.run().path, baseline=3.0, baseline_name="word frequencies")
    assert path.name == "loss.png" and path.read_bytes().startswith(b"\x89PNG")
    assert plot_run(tmp_path).is_file(), "a run without rows gets an empty picture, not an error"
