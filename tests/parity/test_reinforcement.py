"""A task that plays keeps the promise: the same episodes and losses in any layout, and resumed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from shoal.checkpoint.manifest import Manifest
from shoal.data.verify import verify_run
from shoal.engine.job import Instruments
from shoal.errors import ConfigError
from shoal.launch import local
from shoal.launch.pool import WorkerPool
from shoal.launch.summary import last_words
from shoal.prove.parity import prove
from tiny import Bench, Run, largest_difference

RECIPE = """\
seed: 3
task: {kind: reinforcement, environment: CartPole-v1, actors: 6, rollout_steps: 16, epochs: 2}
model:
  kind: config
  architecture: vit
  hidden_size: 16
  intermediate_size: 32
  num_hidden_layers: 1
  num_attention_heads: 2
  patch_size: 1
data: {source: episodes, packing: false, evaluation_samples: 5}
train:
  steps: 10
  global_batch_samples: 24
  evaluate_every_steps: 5
  optimizer: {kind: adamw, learning_rate: 3.0e-3}
parallel: {replicate: 1}
precision: {compute: float32}
checkpoint: {every_steps: 5}
launch: {workers: processes, threads_per_worker: 1}
"""


@pytest.fixture(scope="module")
def poles(tmp_path_factory: pytest.TempPathFactory, pool: WorkerPool) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("poles"), pool=pool)
    bench.recipe.write_text(RECIPE, encoding="utf-8")
    yield bench


def returns(run: Run) -> list[float]:
    return [row["mean_return"] for row in run.evaluations]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.replicate=2", "launch.workers=threads"),
        pytest.param(("parallel.replicate=2",), marks=pytest.mark.slow),
        pytest.param(("parallel.shard=2",), marks=pytest.mark.slow),
        pytest.param(("train.micro_batch_samples=4",), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_one_loss_curve_in_any_layout(poles: Bench, overrides: tuple[str, ...]) -> None:
    """Ten steps are a rollout and a part of the next, which the weights of the first ones play."""
    one, other = poles.run(), poles.run(*overrides)
    assert len(one.losses) == 10
    # normalised advantages add up to 0, so a loss is what is left of parts of about 1
    assert max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True)) < 1e-6
    norms = [[row["gradient_norm"] for row in run.rows if "loss" in row] for run in (one, other)]
    assert largest_difference(*norms) < 1e-5
    assert returns(other) == returns(one)
    history = [json.loads((run.path / "shown.json").read_text()) for run in (one, other)]
    assert history[0] == history[1] and history[0]["history"]


def test_a_run_that_was_stopped_within_a_rollout_goes_on_as_if_it_had_not(poles: Bench) -> None:
    straight = poles.run()
    stopped = poles.train("train.stop_after_steps=5")
    poles.resume(stopped, "train.stop_after_steps=null")
    assert stopped.losses == straight.losses
    assert stopped.weights == straight.weights
    assert returns(stopped)[-1] == returns(straight)[-1]


def test_every_transition_is_read_once_and_the_end_says_what_it_came_to(poles: Bench) -> None:
    run = poles.run()
    assert verify_run(run.path).problems == []
    summary = json.loads((run.path / "summary.json").read_text())
    assert 9 < summary["baseline"]["random_return"] < 60
    assert summary["evaluation"]["environment_steps"] == 2 * 6 * 16
    words = "\n".join(last_words(run.path, summary, recipe="mine.yaml"))
    assert "after 192 steps of the environment (5 episodes" in words
    assert "acting at random: " in words and "transitions per second" in words
    with Image.open(run.path / "returns.png") as picture:
        assert picture.size[0] > 800


def test_transformers_plays_as_well_with_the_exported_model(poles: Bench) -> None:
    """The folder alone, in gymnasium's own loop, on the episodes of the last evaluation."""
    import gymnasium
    import torch
    import transformers

    from shoal.data.stream import Evaluation

    run = poles.run()
    model = transformers.AutoModelForImageClassification.from_pretrained(run.path / "model")
    saved = Manifest.newest(run.path / "checkpoints")
    assert saved is not None
    data = Path(saved.state["inputs"]["data_directory"])
    totals, environment = [], gymnasium.make("CartPole-v1")
    for row in Evaluation(data, batch_samples=1, samples=5).rows():
        seen, _ = environment.reset(seed=int(row["episodes"]))
        totals.append(0.0)
        over = False
        while not over:
            logits = model(torch.from_numpy(seen)[None, :, None, None]).logits[0, :2]
            seen, reward, terminated, truncated, _ = environment.step(int(logits.argmax()))
            totals[-1] += float(reward)
            over = terminated or truncated
    assert sum(totals) / 5 == pytest.approx(returns(run)[-1])


def test_a_mistaken_environment_is_told_before_anything_starts(poles: Bench) -> None:
    with pytest.raises(ConfigError, match="did you mean 'CartPole-v1'"):
        poles.train("task.environment=CartPole-v")
    with pytest.raises(ConfigError, match="7 does not divide the 96"):
        poles.train("train.global_batch_samples=7")


@pytest.mark.slow
def test_exact_mode_has_the_same_bits(poles: Bench) -> None:
    found = [
        poles.run("train.exact=true", "train.micro_batch_samples=4", *more).digits
        for more in ((), ("parallel.replicate=2", "launch.workers=threads"))
    ]
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_layout_is_proven(poles: Bench) -> None:
    found = prove(
        poles.recipe, ["parallel.shard=2"], out=poles.new_path(), pool=poles.pool, steps=2
    )
    assert found.proven, str(found)


@pytest.mark.slow
def test_the_shipped_recipe_in_short(poles: Bench) -> None:
    """Two rollouts of its nineteen: far from what it comes to, and well above acting at random."""
    out = poles.new_path()
    overrides = ["train.steps=160", "train.evaluate_every_steps=80", "parallel.replicate=1"]
    result = local.train("cartpole", overrides, out=out, console=False, pool=poles.pool)
    scores = result.summary["evaluation"]
    assert scores["mean_return"] > 2 * result.summary["baseline"]["random_return"]
    assert scores["environment_steps"] == 4096 and scores["evaluation_targets"] == 20


@pytest.mark.slow
def test_a_lost_worker_is_replaced_within_a_rollout(poles: Bench) -> None:
    """Its actors are played on by whoever comes: no digit of the losses moves."""
    out = poles.new_path()
    fault = {"kind": "kill", "rank": 1, "step": 9, "phase": "play", "number": 0}
    overrides = ["parallel.replicate=2"]
    local.train(
        poles.recipe,
        overrides,
        out=out,
        console=False,
        pool=poles.pool,
        instruments=Instruments(planned_faults=(fault,)),
    )
    run = Run(out)
    assert "recovered" in run.events
    assert run.losses == poles.run("parallel.replicate=2").losses
    assert returns(run)[-1] == returns(poles.run())[-1]
