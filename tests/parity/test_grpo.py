"""Completions and their losses are the same in any layout, cut by vocabulary too, and resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from shoal.data.verify import verify_run
from shoal.errors import ConfigError, ModelError
from shoal.launch import local
from shoal.launch.pool import WorkerPool
from shoal.launch.summary import last_words
from tiny import Bench, Run, largest_difference

RECIPE = """\
seed: 3
task:
  kind: grpo
  reward: tiny:share_of_letters
  group: 4
  completion_tokens: 3
  epochs: 2
model:
  kind: config
  architecture: llama
  hidden_size: 32
  intermediate_size: 64
  num_hidden_layers: 1
  num_attention_heads: 4
  num_key_value_heads: 2
  max_position_embeddings: 64
data:
  source: sum-questions
  max_samples: 60
  sequence_tokens: 16
  packing: false
  validation: {source: sum-questions-held-out}
  evaluation_samples: 6
  tokenizer: {kind: train, vocabulary_size: 260}
train:
  steps: 10
  global_batch_samples: 96
  evaluate_every_steps: 5
  optimizer: {kind: adamw, learning_rate: 1.0e-2}
  schedule: {kind: constant}
parallel: {replicate: 1}
precision: {compute: float32}
checkpoint: {every_steps: 5}
launch: {workers: processes, threads_per_worker: 1}
"""


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory, pool: WorkerPool) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("sums"), pool=pool)
    bench.recipe.write_text(RECIPE, encoding="utf-8")
    yield bench


def history(run: Run) -> list[list[float]]:
    """Mean reward of each rollout."""
    found: list[list[float]] = json.loads((run.path / "shown.json").read_text())["history"]
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("parallel.replicate=2", "launch.workers=threads"), marks=pytest.mark.slow),
        ("parallel.replicate=2",),
        pytest.param(("parallel.shard=2",), marks=pytest.mark.slow),
        pytest.param(("parallel.tensor=2",), marks=pytest.mark.slow),
        pytest.param(("train.micro_batch_samples=2",), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_one_loss_curve_in_any_layout(sums: Bench, overrides: tuple[str, ...]) -> None:
    one, other = sums.run(), sums.run(*overrides)
    assert len(one.losses) == 10 and len(history(one)) == 5
    assert history(other) == history(one)
    # advantages of a group add up to 0, so a loss is what is left of parts of about 1
    assert max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True)) < 1e-6
    norms = [[row["gradient_norm"] for row in run.rows if "loss" in row] for run in (one, other)]
    assert largest_difference(*norms) < 1e-5
    rewards = [[row["mean_reward"] for row in run.evaluations] for run in (one, other)]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-9)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parallel.replicate=1", "by the engine of serving: exact products in float32"),
        pytest.param("parallel.tensor=2", "a replica is cut over several", marks=pytest.mark.slow),
        pytest.param("precision.compute=bfloat16", "by the engine", marks=pytest.mark.slow),
        pytest.param("train.quantise={bits: 8}", "rounded weights", marks=pytest.mark.slow),
    ],
)
def test_the_start_says_how_prompts_are_completed(sums: Bench, override: str, words: str) -> None:
    story: list[dict[str, Any]] = []
    overrides = ["train.steps=2", "train.evaluate_every_steps=2", override]
    local.train(
        sums.recipe,
        overrides,
        out=sums.new_path(),
        console=False,
        pool=sums.pool,
        story=story,
    )
    (said,) = [each["text"] for each in story if each["event"] == "completions"]
    assert words in said
    assert ("whole rows for each token" in said) == ("tensor" in override or "bits" in override)


def test_what_is_learned_from_is_as_likely_as_when_it_was_said(sums: Bench) -> None:
    """Prompts that are aligned for sampling, and rows of a batch: no bound, however narrow, cuts
    the first step after a rollout."""
    wide, narrow = (
        run.rows[1] for run in (sums.run(), sums.run("task.clip=1e-5", "train.steps=1"))
    )
    assert narrow["loss"] == pytest.approx(wide["loss"], abs=1e-7)
    assert narrow["gradient_norm"] == pytest.approx(wide["gradient_norm"], rel=1e-5)


@pytest.mark.slow
def test_a_run_that_was_stopped_within_a_rollout_goes_on_as_if_it_had_not(sums: Bench) -> None:
    straight = sums.run()
    stopped = sums.train("train.stop_after_steps=5")
    sums.resume(stopped, "train.stop_after_steps=null")
    assert stopped.losses == straight.losses
    assert stopped.weights == straight.weights and history(stopped) == history(straight)


def test_the_reward_rises_and_the_end_says_so(sums: Bench) -> None:
    run = sums.run()
    assert history(run)[-1][1] > history(run)[0][1]
    assert verify_run(run.path).problems == []
    summary = json.loads((run.path / "summary.json").read_text())
    assert summary["baseline"] == {"silent_reward": 0.0}
    words = "\n".join(last_words(run.path, summary, recipe="mine.yaml"))
    assert "mean reward: " in words and "(6 prompts); saying nothing: 0.000" in words
    assert "completion tokens per second" in words
    with Image.open(run.path / "rewards.png") as picture:
        assert picture.size[0] > 800


def test_a_mistaken_reward_is_told_before_anything_starts(sums: Bench) -> None:
    with pytest.raises(ConfigError, match="tiny has no function no_such"):
        sums.train("task.reward=tiny:no_such")


@pytest.mark.slow
def test_a_reference_beside_an_adapter(sums: Bench) -> None:
    """The divergence holds it back: both learn, and what is held learns less."""
    free, held = (
        sums.run("model.adapter={kind: lora, rank: 4}", f"task.kl_coefficient={kl}")
        for kl in (0.0, 5.0)
    )
    assert held.losses != free.losses
    two = sums.run(
        "model.adapter={kind: lora, rank: 4}", "task.kl_coefficient=5.0", "parallel.replicate=2"
    )
    assert max(abs(a - b) for a, b in zip(held.losses, two.losses, strict=True)) < 1e-6


@pytest.mark.slow
def test_the_shipped_recipes_in_short(sums: Bench) -> None:
    """A model that has hardly read sums goes on from its folder, and what it says is counted."""
    first, out = sums.new_path(), sums.new_path()
    small = ["train.global_batch_samples=32", "parallel.replicate=1"]
    read = local.train("sums", ["train.steps=40", *small], out=first, console=False, pool=sums.pool)
    assert (
        read.summary["evaluation"]["perplexity"] < read.summary["evaluation_before"]["perplexity"]
    )
    with pytest.raises(ModelError, match="'runs/sums/model' is no folder"):
        local.train("arithmetic-grpo", small, out=sums.new_path(), console=False, pool=sums.pool)
    overrides = [f"model.path={first}/model", "train.steps=3", "data.evaluation_samples=20"]
    more = ["task.reward=shoal.tasks.rewards:answer_digits", "train.evaluate_every_steps=3"]
    made = local.train(
        "arithmetic-grpo", [*overrides, *more, *small], out=out, console=False, pool=sums.pool
    )
    assert len(history(Run(out))) == 3 and 0 < made.summary["evaluation"]["mean_reward"] < 1
    completed = [row["completions"] for row in Run(out).evaluations]
    assert [len(each) for each in completed] == [2, 2]
