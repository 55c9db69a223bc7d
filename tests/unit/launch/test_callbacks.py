"""Callbacks: plain data in the user's own process; an error saves, stops and is raised."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.errors import UserError
from shoal.launch import local
from shoal.launch.callbacks import Callbacks
from shoal.observe.events import read_lines
from tiny import Bench

QUICK = ["train.steps=8", "train.evaluate_every_steps=4", "checkpoint.every_steps=4"]


def test_they_hear_of_steps_evaluations_and_saves(bench: Bench) -> None:
    heard: list[tuple[str, dict[str, Any]]] = []
    callbacks = Callbacks(
        {
            name: lambda data, name=name: heard.append((name, data))
            for name in ("on_step", "on_evaluation", "on_save")
        }
    )
    out = bench.new_path()
    local.train(bench.recipe, QUICK, out=out, console=False, pool=bench.pool, callbacks=callbacks)
    rows = read_lines(out / "metrics.jsonl")
    assert [row for name, row in heard if name != "on_save"] == rows
    assert [row["step"] for name, row in heard if name == "on_step"] == list(range(1, 9))
    assert [row["step"] for name, row in heard if name == "on_evaluation"] == [0, 4, 8]
    assert [data["step"] for name, data in heard if name == "on_save"] == [4, 8]


def test_an_error_saves_stops_and_is_raised(bench: Bench) -> None:
    calls = []

    def fails(row: dict[str, Any]) -> None:
        calls.append(row["step"])
        if row["step"] == 3:
            raise ZeroDivisionError("mine")

    out = bench.new_path()
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        local.train(
            bench.recipe,
            ["train.steps=4000", "train.evaluate_every_steps=0", "checkpoint.every_steps=0"],
            out=out,
            console=False,
            pool=bench.pool,
            callbacks=Callbacks({"on_step": fails}),
        )
    assert caught.value.__notes__ == [f"the run was saved; go on with: shoal resume {out}"]
    assert any("fails" in str(entry) for entry in caught.traceback)
    assert calls == [1, 2, 3]
    saved = [path.name for path in (out / "checkpoints").iterdir() if path.name[0] != "."]
    assert len(saved) == 1
    heard: list[int] = []
    local.resume(
        out,
        [f"train.stop_after_steps={int(saved[0].removeprefix('step-')) + 2}"],
        console=False,
        pool=bench.pool,
        callbacks=Callbacks({"on_step": lambda row: heard.append(row["step"])}),
    )
    assert len(heard) == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"on_stop": print}, "unknown 'on_stop'; did you mean 'on_step'"),
        ({"on_save": 3}, "on_save is no function, but 3"),
    ],
)
def test_what_nothing_is_called_by(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Callbacks(given)
