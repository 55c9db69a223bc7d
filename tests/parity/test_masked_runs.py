"""Predicting hidden tokens as a run: any layout, straight and resumed, and the folder opened."""

from __future__ import annotations

import json

import pytest
import transformers

from shoal.errors import DataError
from shoal.prove.parity import prove
from tiny import Bench, Run, largest_difference

MODEL = (
    "model={kind: config, architecture: bert, hidden_size: 32, intermediate_size: 64, "
    "num_hidden_layers: 2, num_attention_heads: 4, max_position_embeddings: 64}"
)
GIVEN = ("task.kind=masked-lm", MODEL, "train.steps=10", "train.evaluate_every_steps=10")


@pytest.fixture(scope="module")
def one(bench: Bench) -> Run:
    return bench.run(*GIVEN)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "layout",
    [
        ("parallel={replicate: 2}", "launch.workers=threads"),
        ("parallel={replicate: 1, shard: 2}", "train.micro_batch_samples=2"),
        ("parallel={replicate: 1, tensor: 2}",),
    ],
    ids=" ".join,
)
def test_any_layout_hides_the_same_tokens(bench: Bench, one: Run, layout: tuple[str, ...]) -> None:
    other = bench.run(*GIVEN, *layout)
    assert largest_difference(other.losses, one.losses) < 1e-5
    assert other.evaluations[-1]["accuracy"] == one.evaluations[-1]["accuracy"]
    counts = [[row["tokens"] for row in run.rows if "loss" in row] for run in (one, other)]
    assert counts[0] == counts[1], "the targets of each step"


def test_resumed_is_straight(bench: Bench, one: Run) -> None:
    again = bench.train(*GIVEN, "train.stop_after_steps=4", "checkpoint.every_steps=4")
    bench.resume(again)
    assert again.losses == one.losses and again.weights == one.weights


def test_a_document_of_its_own_row(bench: Bench) -> None:
    alone = bench.run(*GIVEN, "data.packing=false")
    assert alone.losses[-1] < alone.losses[0]


def test_a_layout_is_proven(bench: Bench) -> None:
    """Opened by transformers too: the loss of one row at a time, with the same tokens hidden."""
    asked = [*GIVEN, "parallel.replicate=2", "data.packing=false", "model.dropout=off"]
    found = prove(bench.recipe, asked, out=bench.new_path(), pool=bench.pool, steps=2)
    assert found.proven, str(found)
    assert found.largest["opened"][0] < 1e-5


def test_the_end_has_the_baseline_beside_and_a_model_that_fills_masks(one: Run) -> None:
    summary = json.loads((one.path / "summary.json").read_text())
    assert 0 <= summary["evaluation"]["accuracy"] <= 1
    assert summary["baseline"]["unigram_loss"] > 1
    fill = transformers.pipeline("fill-mask", str(one.path / "model"), device="cpu")
    found = fill(f"The lamp keeper {fill.tokenizer.mask_token} the silver key.")
    assert len(found) == 5


def test_another_seed_hides_other_tokens_and_is_scored_on_the_same(bench: Bench, one: Run) -> None:
    other = bench.run(*GIVEN, "seed=4")
    targets = [run.evaluations[-1]["evaluation_targets"] for run in (one, other)]
    assert targets[0] == targets[1]
    counts = [[row["tokens"] for row in run.rows if "loss" in row] for run in (one, other)]
    assert counts[0] != counts[1]


def test_a_model_whose_tokenizer_hides_nothing(bench: Bench) -> None:
    folder = bench.run().path / "model"
    with pytest.raises(DataError, match="expected a tokenizer with a mask token"):
        bench.train(*GIVEN, f"data.tokenizer={{kind: folder, path: {folder}}}")
