"""An error that comes again at the same place is told, not tried four times."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.engine.job import Instruments
from shoal.errors import UserError, WorkerError
from shoal.launch import local
from tiny import Bench, Run

SHORT = (
    "train.steps=10",
    "train.evaluate_every_steps=0",
    "checkpoint.every_steps=4",
    "checkpoint.background=false",  # the save of step 4 is done before the error of step 6
)
TWO = ("parallel.replicate=2", "launch.workers=processes", "train.micro_batch_samples=2")
THREADS = ("parallel.replicate=2", "launch.workers=threads")


def errors(*places: tuple[int, int]) -> Instruments:
    """Workers that raise at (rank, step), each once."""
    faults = [
        {"number": number, "kind": "raise", "rank": rank, "step": step, "phase": "forward"}
        for number, (rank, step) in enumerate(places)
    ]
    return Instruments(planned_faults=tuple(faults))


def trained(bench: Bench, *overrides: str, instruments: Instruments) -> Run:
    run, story = Run(bench.new_path()), list[dict[str, Any]]()
    local.train(
        bench.recipe,
        (*SHORT, *overrides),
        out=run.path,
        console=False,
        pool=bench.pool,
        instruments=instruments,
        story=story,
    )
    return run


@pytest.mark.parametrize("layout", [(), TWO, THREADS], ids=["one", "two", "threads"])
def test_the_same_error_twice_ends_the_run(bench: Bench, layout: tuple[str, ...]) -> None:
    out, story = bench.new_path(), list[dict[str, Any]]()
    with pytest.raises(WorkerError) as ended:
        local.train(
            bench.recipe,
            (*SHORT, *layout),
            out=out,
            console=False,
            pool=bench.pool,
            instruments=errors((0, 6), (0, 6), (0, 6)),
            story=story,
        )
    said = str(ended.value)
    assert "RuntimeError: a planned error at step 6, twice at the same place" in said
    assert f"shoal resume {out}" in said and "faults.py" in said, "where, for who looks into it"
    assert [row["event"] for row in story].count("lost") == 2


@pytest.mark.parametrize(
    "places",
    [((0, 3), (0, 6)), ((0, 6), (1, 6))],
    ids=["another step", "another rank"],
)
def test_another_error_is_recovered_from(bench: Bench, places: tuple[tuple[int, int], ...]) -> None:
    run = trained(bench, *TWO, instruments=errors(*places))
    assert run.losses == bench.run(*SHORT, *TWO).losses


def test_a_user_s_mistake_that_a_worker_finds_is_not_retried(bench: Bench) -> None:
    out, story = bench.new_path(), list[dict[str, Any]]()
    with pytest.raises(UserError, match="matches no parameter"):
        local.train(
            bench.recipe,
            (*SHORT, *TWO, "train.freeze=['*nothing*']"),
            out=out,
            console=False,
            pool=bench.pool,
            story=story,
        )
    assert not any(row["event"] in ("lost", "restarted") for row in story)
    assert not out.exists(), "nothing was begun"
