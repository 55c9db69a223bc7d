"""Classifying texts as a run: any layout, straight and resumed, and the folder in a pipeline."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
import torch
import transformers

from shoal.prove.parity import prove
from tiny import Bench, Run, largest_difference

WORDS = {"good": ("fine", "lovely"), "bad": ("awful", "grim"), "plain": ("grey", "usual")}
BERT = (
    "model={kind: config, architecture: bert, hidden_size: 32, intermediate_size: 64, "
    "num_hidden_layers: 2, num_attention_heads: 4, max_position_embeddings: 64}"
)
SHORT = ("data.packing=false", "train.steps=10", "data.validation.fraction=0.2")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 texts of three classes, with a number for each."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("reviews") / "reviews.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["text", "sentiment", "stars", "liked"])
        for _ in range(240):
            label = draw.choice(list(WORDS))
            words = ["the", "film", "was", *draw.choices(WORDS[label], k=draw.randint(1, 5))]
            table.writerow([" ".join(words), label, len(words), "yn"[label == "bad"]])
    return path


def arguments(reviews: Path, objective: str) -> list[str]:
    field = {"classes": "sentiment", "binary": "liked", "number": "stars"}[objective]
    task = f"task={{kind: sequence-classification, objective: {objective}, label_field: {field}}}"
    return [task, f"data.source={reviews}", "data.text_field=text", BERT, *SHORT]


@pytest.mark.quick(2)
@pytest.mark.parametrize("objective", ["classes", "binary", "number"])
@pytest.mark.parametrize("layout", ["{replicate: 2}", "{replicate: 1, shard: 2}"])
def test_two_workers_learn_what_one_does(
    bench: Bench, reviews: Path, objective: str, layout: str
) -> None:
    given = arguments(reviews, objective)
    one = bench.run(*given)
    two = bench.run(*given, f"parallel={layout}", "train.micro_batch_samples=2")
    assert largest_difference(one.losses, two.losses) < 1e-5


@pytest.fixture(scope="module")
def run(bench: Bench, reviews: Path) -> Run:
    return bench.run(*arguments(reviews, "classes"))


def test_resumed_is_straight(bench: Bench, reviews: Path, run: Run) -> None:
    again = bench.train(
        *arguments(reviews, "classes"), "train.stop_after_steps=4", "checkpoint.every_steps=4"
    )
    bench.resume(again)
    assert again.losses == run.losses and again.weights == run.weights


def test_the_folder_is_a_classifier_of_transformers(run: Run) -> None:
    classify = transformers.pipeline("text-classification", str(run.path / "model"), device="cpu")
    with torch.no_grad():
        found = classify(["the film was lovely"], top_k=None)[0]
    assert {each["label"] for each in found} == set(WORDS)


def test_the_end_has_the_baseline_beside(run: Run) -> None:
    summary = json.loads((run.path / "summary.json").read_text())
    assert 0 <= summary["evaluation"]["macro_f1"] <= 1
    assert summary["baseline"]["bag_of_words_f1"] > 0.9, "the words say it all"


@pytest.mark.parametrize("objective", ["binary", "number"])
def test_transformers_own_loss_of_one_output(bench: Bench, reviews: Path, objective: str) -> None:
    """The folder of a save, opened and called with labels a row at a time, as `merge` does."""
    given = [*arguments(reviews, objective), "parallel.replicate=2", "model.dropout=off"]
    found = prove(bench.recipe, given, out=bench.new_path(), pool=bench.pool, steps=2)
    assert found.proven, str(found)
    assert found.largest["opened"][0] < 1e-5
