"""`shoal config show` is a statement that a person can check against what they meant."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shoal.config.load import load_recipe
from shoal.config.statement import statement


def said(*overrides: str) -> dict[str, str]:
    lines = statement(
        load_recipe("quickstart", ["train.steps=300", "train.global_batch_samples=32", *overrides])
    )
    return dict(line.split(": ", 1) for line in lines)


def test_a_layout_that_is_given() -> None:
    lines = said(
        "parallel.replicate=4", "launch.workers=threads", "train.micro_batch_samples=4",
        "launch.threads_per_worker=1", "precision.compute=float32",
    )  # fmt: skip
    assert lines["global batch"] == "32 samples x 256 tokens = 8,192 tokens a step"
    assert lines["length"] == "300 optimizer steps = 9,600 samples, 2.46M tokens"
    assert lines["workers"] == (
        "4 threads of one process, ranks 0-3; each a whole replica, with 8 samples of the batch; "
        "threads in each: 1"
    )
    assert lines["micro batch"] == "4 samples, 2 of them a worker and step"
    assert lines["gradients"] == (
        "summed over ranks 0-3 at every step in float32, sent as they are; divided by the targets "
        "of the whole batch"
    )
    assert lines["numbers"] == (
        "computes in float32; weights and optimizer state are kept in float32"
    )


def test_what_is_open_says_so() -> None:
    lines = said()
    for key in ("workers", "micro batch", "gradients", "numbers"):
        assert "decided at start" in lines[key]


def test_one_worker_reduces_nothing() -> None:
    lines = said("parallel={}")
    assert lines["workers"].startswith("one, rank 0, with the whole batch")
    assert lines["gradients"].startswith("one replica, nothing to reduce")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("{kind: constant}", "begins at 0.003 and stays, to step 300"),
        (
            "{kind: linear, warmup_steps: 9}",
            "rises to 0.003 over 9 steps, then falls in a straight line to 0 at step 300",
        ),
        ("{kind: cosine}", "begins at 0.003 and falls by half a cosine to 0.0003 at step 300"),
        (
            "{kind: warmup-stable-decay, decay_steps: 50}",
            "begins at 0.003 and stays; over the last 50 steps falls to 0 at step 300",
        ),
    ],
)
def test_schedules_in_words(schedule: str, expected: str) -> None:
    lines = said("train.optimizer.learning_rate=3e-3", f"train.schedule={schedule}")
    assert lines["learning rate"] == expected


def test_the_rest_in_words() -> None:
    lines = said(
        "train.exact=true", "train.stop_after_steps=10", "train.evaluate_every_steps=0",
        "checkpoint.every_steps=0", "data.packing=false", "train.freeze=['*norm*']",
        "train.max_gradient_norm=null", "train.optimizer={kind: muon}",
    )  # fmt: skip
    assert lines["global batch"] == "32 samples of at most 256 tokens, up to 8,192 a step"
    assert lines["evaluates"] == "never"
    assert lines["saves"].startswith("at the end and when stopped")
    assert re.search(r"muon.*not clipped; frozen: \*norm\*", lines["optimizer"])
    assert "the same bits" in lines["exact"]
    assert "after step 10" in lines["stops early"]


@pytest.mark.parametrize("kind", ["adamw", "muon", "sgd"])
def test_the_optimizer_by_its_name_and_what_decays(kind: str) -> None:
    """test_anatomy.py holds that embeddings are spared; every text says the same."""
    text = said(f"train.optimizer={{kind: {kind}}}")["optimizer"]
    assert text.startswith(kind) and "(not on norms, biases, embeddings)" in text
    page = (Path(__file__).parents[3] / "docs/guide/recipe.md").read_text(encoding="utf-8")
    section = page.partition(f"**`kind: {kind}`**")[2].partition("**`kind")[0]
    (row,) = [line for line in section.splitlines() if line.startswith("| `weight_decay`")]
    assert "Of matrices; norms, biases and embeddings have none." in row


def test_epochs() -> None:
    assert said("train.steps=null", "train.epochs=2")["length"] == (
        "2 epochs of the data; optimizer steps decided at start"
    )
