"""One seed, one loss curve, when the blocks of a replica are divided into stages."""

from __future__ import annotations

import pytest

from parity.test_replicas import FROZEN, GPT2, PADDED, SHORT, assert_same_curve
from tiny import Bench, largest_difference

FOUR = ("model.num_hidden_layers=4", "train.micro_batch_samples=2")
PIPELINES = {
    "1f1b": ("parallel.pipeline=2", "train.micro_batch_samples=4"),
    "gpipe": ("parallel.pipeline={degree: 2, schedule: gpipe}", "train.micro_batch_samples=8"),
    "four": ("parallel.pipeline=4", *FOUR),
    "by hand": ("parallel.pipeline={degree: 2, split: [3, 1]}", *FOUR),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("layout", PIPELINES.values(), ids=PIPELINES)
def test_stages_follow_one_worker(bench: Bench, layout: tuple[str, ...]) -> None:
    """The embedding is tied to the head: the first and the last stage hold it, and sum once."""
    model = [each for each in layout if each.startswith("model.")]
    assert_same_curve(bench.run(*layout, *SHORT), bench.run(*model, *SHORT))


@pytest.mark.quick(1)
@pytest.mark.parametrize("change", [GPT2, PADDED, FROZEN], ids=["gpt2-dropout", "padded", "frozen"])
def test_other_recipes_in_stages(bench: Bench, change: tuple[str, ...]) -> None:
    change = (*SHORT, *change)
    layout = ("parallel.pipeline=2", "train.micro_batch_samples=4")
    assert_same_curve(bench.run(*layout, *change), bench.run(*change))


def test_a_save_of_stages_goes_on_in_any_layout(bench: Bench) -> None:
    """And a save of any layout goes on in stages; prompts are completed by all of them."""
    length = ("train.steps=20", "train.evaluate_every_steps=5", "checkpoint.every_steps=5")
    length = (*length, "task={kind: causal-lm, prompts: ['The lamp'], sample_tokens: 6}")
    wanted = bench.run(*length)
    stages, tensor = "parallel={pipeline: 2}", "parallel={tensor: 2}"
    for first, second in ((stages, tensor), (tensor, stages)):
        run = bench.train(
            first, *length, "train.micro_batch_samples=4", "train.stop_after_steps=10"
        )
        bench.resume(run, second, "train.stop_after_steps=null")
        assert largest_difference(run.losses, wanted.losses) < 1e-5
        texts = [row["completions"] for row in run.evaluations]
        assert texts == [row["completions"] for row in wanted.evaluations]
