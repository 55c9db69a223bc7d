"""Runs that diverge, or have reached what was asked for, end early: all ranks at one step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from shoal.cli.main import main
from shoal.engine.job import Instruments
from shoal.errors import Diverged, UserError
from shoal.launch import local
from shoal.observe.events import read_lines
from tiny import Bench, Run

# a rate at which nothing can be learned, from the first steps on
WILD = (
    "train.steps=40",
    "train.optimizer={kind: sgd, learning_rate: 10.0}",
    "train.schedule={kind: constant}",
    "train.max_gradient_norm=null",
    "train.evaluate_every_steps=4",
    "train.divergence_steps=6",
    "checkpoint.every_steps=4",
)
TWO = ("parallel.replicate=2", "train.micro_batch_samples=2")
# a rate at which nothing changes
STILL = (
    "train.steps=40",
    "train.optimizer={kind: sgd, learning_rate: 1.0e-30}",
    "train.evaluate_every_steps=3",
    "checkpoint.every_steps=0",
)


def summary(run: Run) -> dict[str, Any]:
    return dict(json.loads((run.path / "summary.json").read_text()))


def diverged(bench: Bench, *overrides: str, **keywords: Any) -> Run:
    run = Run(bench.new_path())
    with pytest.raises(Diverged, match=r"above its start .*train.optimizer.learning_rate"):
        local.train(
            bench.recipe,
            (*WILD, *overrides),
            out=run.path,
            console=False,
            pool=bench.pool,
            **keywords,
        )
    return run


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    "layout",
    [
        (),
        (*TWO, "launch.workers=processes"),
        (*TWO, "launch.workers=threads"),
        (*TWO, "sync={kind: local-sgd, every_steps: 4}", "train.optimizer.learning_rate=10.0"),
        ("parallel.shard=2", "train.micro_batch_samples=2"),
    ],
    ids=["one", "processes", "threads", "local-sgd", "shard"],
)
def test_a_run_that_diverges_ends(bench: Bench, layout: tuple[str, ...]) -> None:
    run = diverged(bench, *layout)
    steps, found = len(run.losses), summary(run)
    assert 6 <= steps < 40
    assert found["ending"]["kind"] == "diverged" and found["steps"] == steps
    assert "not finite for" in found["ending"]["text"]
    assert run.events[-1] == "diverged" and not (run.path / "model").exists()
    saved = {int(p.name[5:]) for p in (run.path / "checkpoints").glob("step-*")}
    assert steps not in saved, "its end is not worth keeping"


def test_a_worker_that_was_replaced_ends_it_at_the_same_step(bench: Bench) -> None:
    two = (*TWO, "launch.workers=processes")
    fault = {"number": 0, "kind": "kill", "rank": 1, "step": 5, "phase": "forward"}
    run = diverged(bench, *two, instruments=Instruments(planned_faults=(fault,)))
    assert "lost" in run.events
    assert run.digits == diverged(bench, *two).digits


def test_it_may_only_be_warned_of(bench: Bench) -> None:
    run = bench.train(*WILD, "train.on_divergence=warn", "train.steps=16")
    assert len(run.losses) == 16 and run.events.count("diverging") == 1
    assert summary(run)["ending"] is None and (run.path / "model").is_dir()


def test_the_best_save_is_kept_beside_the_newest(bench: Bench) -> None:
    """The first steps learn; then the rate is raised until nothing of it is left."""
    kept = ("checkpoint.every_steps=4", "checkpoint.keep=1", "train.evaluate_every_steps=4")
    run = bench.train("train.steps=24", *kept, "train.stop_after_steps=8")
    ways = (*WILD[1:4], "train.on_divergence=ignore")
    bench.resume(run, *ways)
    losses = {row["step"]: row["evaluation_loss"] for row in run.evaluations if row["step"]}
    best = min(losses, key=lambda step: losses[step] if losses[step] is not None else math.inf)
    assert best == 8 and summary(run)["best_step"] == 8
    saved = sorted(path.name for path in (run.path / "checkpoints").glob("step-*"))
    assert saved == ["step-00000008", "step-00000024"]


def test_the_model_may_be_that_of_the_best_save(bench: Bench, tmp_path: Path) -> None:
    kept = ("train.steps=24", "checkpoint.keep=1", "train.evaluate_every_steps=4")
    run = bench.train(*kept, "train.stop_after_steps=8")
    bench.resume(run, *WILD[1:4], "train.on_divergence=ignore", "checkpoint.model=best")
    with pytest.raises(SystemExit) as ended:
        main(
            ["merge", str(run.path / "checkpoints/step-00000008"), "--out", str(tmp_path / "best")]
        )
    assert ended.value.code == 0
    written, best = (
        load_file(folder / "model.safetensors")
        for folder in (run.path / "model", tmp_path / "best")
    )
    assert written.keys() == best.keys()
    assert all(written[name].equal(best[name]) for name in best)


@pytest.mark.slow
def test_early_stopping_when_nothing_gets_better(bench: Bench) -> None:
    run = bench.train(*STILL, "train.until.patience=2", *TWO)
    found = summary(run)
    assert found["steps"] == 9 and len(run.losses) == 9, "evaluated at 3, 6 and 9"
    assert found["ending"]["kind"] == "no-progress"
    assert (run.path / "model").is_dir() and (run.path / "checkpoints/step-00000009").is_dir()
    ended = read_lines(run.path / "events.jsonl")[-1]
    assert ended["event"] == "finished" and "2 evaluations in a row" in ended["text"]
    bench.resume(run)
    assert len(run.losses) == 9, "it has ended, and still has"
    bench.resume(run, "train.until=null", "train.steps=12")
    assert len(run.losses) == 12


def test_early_stopping_when_enough_is_learned(bench: Bench) -> None:
    whole = bench.run("train.steps=20", "train.evaluate_every_steps=5")
    wanted = whole.evaluations[2]["evaluation_loss"]
    until = f"train.until.evaluation_loss={wanted + 1e-6}"
    words = ("train.steps=20", "train.evaluate_every_steps=5", until)
    out = bench.new_path()
    done = bench.command("train", bench.recipe, *words, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "ended at step 10 of 20: the evaluation loss is" in done.stdout
    assert "shoal generate" in done.stdout, "it is a finished run"
    assert Run(out).losses == whole.losses[:10]


@pytest.mark.slow
def test_a_run_that_diverged_exits_with_one(bench: Bench) -> None:
    out = bench.new_path()
    done = bench.command("train", bench.recipe, *WILD, "--out", out)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"shoal resume {out} train.optimizer.learning_rate=" in done.stderr
    events = read_lines(out / "events.jsonl")
    assert not any(row["event"] in ("lost", "restarted") for row in events), "never retried"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.until={}"], "train.until: expected evaluation_loss, patience or both"),
        (
            ["train.until.patience=2", "train.evaluate_every_steps=0"],
            "train.until: is judged at evaluations, and there are none",
        ),
        (
            ["checkpoint={model: best, keep_best: false}"],
            "checkpoint.model: best needs its save",
        ),
        (
            ["checkpoint.model=best", "train.evaluate_every_steps=0"],
            "checkpoint.model: best is judged at evaluations",
        ),
        (["train.on_divergence=panic"], "'stop', 'warn' or 'ignore'"),
    ],
)
def test_recipes_that_contradict_themselves(bench: Bench, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        local.train(bench.recipe, overrides, out=bench.new_path(), pool=bench.pool)
    assert said in str(refused.value)
