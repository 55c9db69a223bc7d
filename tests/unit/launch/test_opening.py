"""A start says what is trained, and a dry run ends there; a resume says what is new."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shoal.config.load import load_recipe
from shoal.config.recipe import Recipe
from shoal.config.statement import statements
from shoal.data.prepare import open_prepared
from shoal.engine.decision import Decision
from shoal.engine.job import Inputs
from shoal.errors import ConfigError
from shoal.launch import local
from shoal.launch.opening import num_steps, opening
from shoal.launch.prepare import prepare_inputs
from shoal.layout import Layout
from shoal.observe.events import read_lines
from tiny import Bench, write_corpus


def prepared(bench: Bench, *overrides: str) -> tuple[Recipe, Inputs]:
    recipe = load_recipe(str(bench.recipe), overrides)
    return recipe, prepare_inputs(recipe, say=lambda text: None)


def said(recipe: Recipe, inputs: Inputs, layout: Layout | None = None) -> dict[str, str]:
    decision = Decision(layout or Layout(), "processes", 1, 4, "float32", "a test")
    steps = num_steps(recipe, inputs=inputs)
    lines = opening(recipe, inputs=inputs, decision=decision, steps=steps)
    return dict(re.split(r"  +", line.strip(), maxsplit=1) for line in lines)


def test_what_is_trained(bench: Bench) -> None:
    lines = said(*prepared(bench))
    counts = open_prepared(prepared(bench)[1].data_directory).description["parts"]["train"]
    assert lines["data"] == (
        f"{bench.corpus}: {counts['documents']} documents, {counts['samples']} samples, "
        f"{counts['tokens']:,} tokens to train on"
    )
    assert lines["length"] == (
        f"30 optimizer steps = 480 samples, 15.4k tokens = {480 / counts['samples']:.3g} epochs"
    )
    assert lines["batch"] == "16 samples x 32 tokens = 512 tokens a step; micro batch 4"
    assert lines["learning rate"].startswith("rises to 0.003 over 4 steps, then falls by half a")
    assert lines["runs on"] == "cpu, float32; one worker; policy every-step"
    assert "on at most 24 of " in lines["evaluates"]


def test_the_parameters_are_those_that_are_built(bench: Bench) -> None:
    built = bench.run().path / "summary.json"
    parameters = int(re.findall(r'"parameters": (\d+)', built.read_text())[0])
    assert f"{parameters / 1000:.1f}k parameters" in said(*prepared(bench))["model"]


def test_epochs_become_steps(bench: Bench) -> None:
    recipe, inputs = prepared(bench, "train.steps=null", "train.epochs=2")
    steps = -(-inputs.train_samples // 16) * 2
    lines = said(recipe, inputs, Layout(replicate=2))
    assert lines["length"].startswith(f"{steps} optimizer steps = {steps * 16:,} samples")
    assert lines["learning rate"].endswith(f"at step {steps}")
    assert "replicate 2" in lines["runs on"]


def test_a_mixture_says_how_often_each_source_is_read(bench: Bench, tmp_path: Path) -> None:
    small = write_corpus(tmp_path / "small.jsonl", seed=1, documents=60)
    mixed = f"data.source=[{{source: {bench.corpus}, weight: 3}}, {{source: {small}, weight: 1}}]"
    recipe, inputs = prepared(bench, mixed)
    parts = open_prepared(inputs.data_directory).sources
    epochs = [480 * share / part.num_samples("train") for share, part in zip((0.75, 0.25), parts)]
    assert said(recipe, inputs)["length"].endswith(
        f"= {epochs[0]:.3g} epochs of {parts[0].name}, {epochs[1]:.3g} epochs of {parts[1].name}"
    )


def test_images_have_no_tokens() -> None:
    lines = statements(load_recipe("digits"))
    assert lines["length"] == "3000 optimizer steps = 192,000 samples"
    assert lines["global batch"] == "64 samples a step"


def test_a_tokenizer_is_announced_when_it_is_trained(bench: Bench) -> None:
    recipe = load_recipe(str(bench.recipe), ["data.tokenizer.vocabulary_size=301"])
    said: list[str] = []
    prepare_inputs(recipe, say=said.append)
    prepare_inputs(recipe, say=said.append)
    assert said.count("training a tokenizer of 301 tokens") == 1


def test_inputs_of_older_runs_are_read(bench: Bench) -> None:
    recipe, inputs = prepared(bench)
    tree = inputs.to_json()
    del tree["counts"]
    old = Inputs.from_json(tree)
    assert said(recipe, old)["data"].endswith(f": {old.train_samples} samples to train on")


def test_a_dry_run_leaves_nothing(
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    decision = local.dry_run(bench.recipe, pool=bench.pool)
    assert decision.layout == Layout() and not list(tmp_path.iterdir())
    told = capsys.readouterr().out
    assert "plan: 1 worker" in told and "28.2k parameters" in told and "step" in told
    with pytest.raises(ConfigError, match="unknown key"):
        local.dry_run(bench.recipe, ["train.stepps=3"], pool=bench.pool)


def test_epochs_have_an_end_in_sight(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    change = ["train.steps=null", "train.epochs=0.1", "train.evaluate_every_steps=0"]
    change.append("train.schedule.warmup_steps=1")
    result = local.train(bench.recipe, change, out=bench.new_path(), pool=bench.pool)
    steps = result.summary["of_steps"]
    assert f"step {steps:>5}/{steps}  loss" in capsys.readouterr().out


def test_a_resume_says_where_and_what_is_new(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    run = bench.train("train.stop_after_steps=10")
    change = ["train.optimizer.learning_rate=0.01", "train.stop_after_steps=12"]
    local.resume(run.path, change, pool=bench.pool)
    told = capsys.readouterr().out
    assert "changed: train.optimizer.learning_rate 0.003 -> 0.01\n" in told
    assert "resumed: going on after step 10\n" in told
    events = [row for row in read_lines(run.path / "events.jsonl") if row["event"] == "changed"]
    assert [(row["key"], row["before"], row["after"]) for row in events] == [
        ("train.stop_after_steps", 10, 12),
        ("train.optimizer.learning_rate", 0.003, 0.01),
    ]


def test_a_locked_key_is_named_as_it_was_given(bench: Bench) -> None:
    with pytest.raises(ConfigError, match=r"data\.sequence_tokens: cannot change in a run that"):
        bench.resume(bench.run(), "data.sequence_tokens=64")
