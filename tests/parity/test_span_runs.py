"""Finding answers as a run: any layout, straight and resumed, and the folder opened."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import transformers

from shoal.launch.summary import last_words
from shoal.prove.parity import prove
from tiny import ENDS, OBJECTS, SUBJECTS, VERBS, Bench, Run, largest_difference

MODEL = (
    "model={kind: config, architecture: bert, hidden_size: 32, intermediate_size: 64, "
    "num_hidden_layers: 2, num_attention_heads: 4, max_position_embeddings: 64}"
)
SHORT = ("data.packing=false", "train.steps=10", "data.validation.fraction=0.2")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """120 questions in SQuAD's format, a tenth of them without an answer."""
    draw, path = random.Random(0), tmp_path_factory.mktemp("squad") / "squad.json"
    paragraphs = []
    for number in range(120):
        words = [draw.choice(each) for each in (SUBJECTS, VERBS, OBJECTS, ENDS)]
        context = " ".join(words[: draw.randint(3, 4)]) + "."
        answer = {"text": words[2], "answer_start": context.index(words[2])}
        asked = {"id": str(number), "question": f"{words[1]} what?", "answers": [answer]}
        if number % 10 == 0:
            asked |= {"answers": [], "is_impossible": True}
        paragraphs.append({"context": context, "qas": [asked]})
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    return ("task.kind=span-answering", f"data.source={path}", MODEL, *SHORT)


@pytest.fixture(scope="module")
def one(bench: Bench, given: tuple[str, ...]) -> Run:
    return bench.run(*given)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "layout",
    [
        ("parallel={replicate: 2}", "launch.workers=threads", "train.micro_batch_samples=2"),
        ("parallel={replicate: 1, shard: 2}",),
        ("parallel={replicate: 1, tensor: 2}",),
    ],
    ids=" ".join,
)
def test_any_layout(
    bench: Bench, given: tuple[str, ...], one: Run, layout: tuple[str, ...]
) -> None:
    other = bench.run(*given, *layout)
    assert largest_difference(other.losses, one.losses) < 1e-5
    last = [run.evaluations[-1] for run in (one, other)]
    assert last[0]["f1"] == pytest.approx(last[1]["f1"], abs=0.05), "near ties may fall otherwise"


def test_resumed_is_straight(bench: Bench, given: tuple[str, ...], one: Run) -> None:
    again = bench.train(*given, "train.stop_after_steps=4", "checkpoint.every_steps=4")
    bench.resume(again)
    assert again.losses == one.losses and again.weights == one.weights


def test_a_layout_is_proven(bench: Bench, given: tuple[str, ...]) -> None:
    """transformers' own loss of the merged folder, a row at a time, among what is compared."""
    asked = [*given, "parallel.replicate=2", "model.dropout=off"]
    found = prove(bench.recipe, asked, out=bench.new_path(), pool=bench.pool, steps=2)
    assert found.proven, str(found)
    assert found.largest["opened"][0] < 1e-5


def test_the_end_has_the_baseline_beside_and_a_model_that_answers(one: Run, given: object) -> None:
    summary = json.loads((one.path / "summary.json").read_text())
    assert set(summary["baseline"]) == {"uniform_loss", "first_f1"}
    words = "\n".join(last_words(one.path, summary, recipe="mine.yaml"))
    assert "the first 3 words of the text for every answer: F1" in words
    folder: Path = one.path / "model"
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder)
    read = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        found = model(**read("finds what?", "The river finds seven apples.", return_tensors="pt"))
    assert found.start_logits.shape == found.end_logits.shape
