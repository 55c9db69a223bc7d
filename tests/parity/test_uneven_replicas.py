"""A slow replica gets what it can do in time: the same samples, the same loss, less waiting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from shoal.data.verify import verify_run
from shoal.engine.instruments.faults import KINDS
from shoal.engine.job import Instruments
from shoal.errors import ConfigError
from shoal.launch import local
from shoal.observe.events import read_lines
from tiny import Bench, Run, largest_difference

TWO = ("parallel.replicate=2", "launch.workers=processes", "train.micro_batch_samples=2")
LENGTH = ("train.steps=24", "train.evaluate_every_steps=24", "checkpoint.every_steps=0")
slow = pytest.mark.slow


def throttled(
    bench: Bench, *overrides: str, seconds: float = 0.06, more: Sequence[dict[str, Any]] = ()
) -> Run:
    """A run whose replica 1 sleeps in proportion to its work: before every forward."""
    assert "slow" in KINDS
    fault = {"kind": "slow", "rank": 1, "step": 1, "argument": str(seconds), "number": 0}
    planned = Instruments(planned_faults=(fault, *more))
    out = bench.new_path()
    local.train(
        bench.recipe, overrides, out=out, console=False, pool=bench.pool, instruments=planned
    )
    return Run(out)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [each for each in read_lines(run / "events.jsonl") if each["event"] == kind]


def measured(kind: str, *more: str) -> str:
    return f"sync={{{', '.join([f'kind: {kind}', *more, 'shares: measured'])}}}"


@pytest.mark.slow
def test_every_step_gives_the_slow_one_less_and_the_same_loss(bench: Bench) -> None:
    """Sums are added in another order, which is rounding: 24 steps of float32."""
    found = throttled(bench, *TWO, *LENGTH, measured("every-step"))
    equal = bench.run(*TWO, *LENGTH)
    assert largest_difference(found.losses, equal.losses) < 1e-5
    (agreed,) = events(found.path, "shares")
    assert agreed["shares"][0] > 0.8 and "replicas 0 to 1" in agreed["text"]
    shares = [row["share"] for row in found.rows if "loss" in row]
    assert shares[0] == 0.5 and shares[-1] == agreed["shares"][0]
    waited = [row["step_seconds"] for row in found.rows if "loss" in row]
    assert sorted(waited[12:])[6] < 0.6 * sorted(waited[1:10])[4], "it waits for less"
    assert not verify_run(found.path).problems


@slow
def test_in_exact_mode_not_a_bit_changes(bench: Bench) -> None:
    exact = ("train.exact=true", *LENGTH)
    found = throttled(bench, *TWO, *exact, measured("every-step"))
    one = bench.run("train.micro_batch_samples=2", *exact)
    assert len(events(found.path, "shares")) == 1
    assert found.losses == one.losses and found.weights == one.weights


@pytest.mark.parametrize("kind", ["local-sgd", pytest.param("diloco", marks=slow)])
def test_replicas_that_step_alone_take_fewer_steps_where_they_are_slow(
    bench: Bench, kind: str
) -> None:
    found = throttled(bench, *TWO, *LENGTH, measured(kind, "every_steps: 4"), seconds=0.03)
    equal = bench.run(*TWO, *LENGTH, f"sync={{kind: {kind}, every_steps: 4}}")
    agreed = events(found.path, "shares")[0]
    assert agreed["shares"][0] > 0.6
    assert not verify_run(found.path).problems, "every sample once, whoever computed it"
    shares = [row["share"] for row in found.rows if "loss" in row]
    assert set(shares[:12]) == {0.5} and 1.0 in shares, "the other one sits out a step"
    last = [run.evaluations[-1]["evaluation_loss"] for run in (found, equal)]
    assert abs(last[0] / last[1] - 1) < 0.03


@slow
def test_a_writer_that_sits_out_a_step_has_a_row_without_a_loss(bench: Bench) -> None:
    fault = {"kind": "slow", "rank": 0, "step": 1, "argument": "0.06", "number": 0}
    planned = Instruments(planned_faults=(fault,))
    out = bench.new_path()
    overrides = (*TWO, *LENGTH, measured("local-sgd", "every_steps: 4"))
    local.train(
        bench.recipe, overrides, out=out, console=False, pool=bench.pool, instruments=planned
    )
    rows = [row for row in Run(out).rows if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 25))
    idle = [row for row in rows if not row["share"]]
    assert idle and all(row["loss"] is None for row in idle)
    assert "skipped" not in Run(out).events and not verify_run(out).problems


@slow
def test_shares_are_kept_over_a_lost_worker_and_a_resume(bench: Bench) -> None:
    kill = {"kind": "kill", "rank": 1, "step": 16, "number": 1}
    how = (*TWO, "train.steps=24", "checkpoint.every_steps=6", measured("every-step"))
    found = throttled(bench, *how, "train.stop_after_steps=18", more=[kill])
    assert "lost" in found.events or "replaced" in found.events, found.events
    shares = {row["step"]: row["share"] for row in found.rows if "loss" in row}
    assert shares[18] == shares[15] > 0.8, "who takes the place of a worker gets the same"
    bench.resume(found, "train.stop_after_steps=null")
    shares = {row["step"]: row["share"] for row in found.rows if "loss" in row}
    assert shares[19] == shares[18], "a resume begins with them"
    assert not verify_run(found.path).problems


@slow
def test_a_replica_of_two_stages_gets_what_its_schedule_takes(bench: Bench) -> None:
    stages = ("parallel.replicate=2", "parallel.pipeline=2", "launch.workers=processes")
    batch = ("train.global_batch_samples=24", "train.micro_batch_samples=2", *LENGTH)
    fault = {"kind": "slow", "rank": 2, "step": 1, "argument": "0.06", "number": 0}
    planned = Instruments(planned_faults=(fault,))
    out = bench.new_path()
    overrides = (*stages, *batch, measured("every-step"))
    local.train(
        bench.recipe, overrides, out=out, console=False, pool=bench.pool, instruments=planned
    )
    (agreed, *_) = events(out, "shares")
    assert agreed["shares"][0] > 0.6 and 12 * agreed["shares"][1] > 1.9, "1f1b needs two at least"
    one = bench.run(*batch)
    assert largest_difference(Run(out).losses, one.losses) < 1e-5


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (("train.micro_batch_samples=auto",), "set a number, such as 2"),
        (("train.micro_batch_samples=8",), "each replica has 1 micro batch and needs as many"),
        (
            ("train.micro_batch_samples=2", "sync={kind: local-sgd, every_steps: end}"),
            "replicas that meet at the end only never learn how fast the others are",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(
    bench: Bench, overrides: tuple[str, ...], wanted: str
) -> None:
    out = bench.new_path()
    with pytest.raises(ConfigError) as caught:
        local.train(
            bench.recipe,
            ("parallel.replicate=2", *overrides, "sync.shares=measured"),
            out=out,
            console=False,
            pool=bench.pool,
        )
    assert wanted in str(caught.value) and not out.exists()
