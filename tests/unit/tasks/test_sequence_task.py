"""Labels of texts: classes, one of two, numbers; scored as scikit-learn's formulas say."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from shoal.data.corpora import read_opinions
from shoal.data.tokenize import load_tokenizer, train_tokenizer
from shoal.errors import DataError
from shoal.fields import IGNORED
from shoal.tasks.kinds import create
from shoal.tasks.scores import ClassMetrics
from shoal.tasks.sequence_classification import (
    _LOSSES,
    NumberMetrics,
    SequenceClassification,
)
from shoal.tasks.task import Scores, Tools
from tiny import tales

RECORDS = [
    {"text": "a fine day", "label": "good"},
    {"text": "a grim day", "label": "bad"},
    {"text": "fine, fine", "label": "good"},
]


@pytest.fixture(scope="module")
def tools() -> Tools:
    folder = train_tokenizer([tales(seed=0, documents=50)], vocabulary_size=300, cache_key="texts")
    return Tools(load_tokenizer(folder), sequence_tokens=6)


def made(**options: Any) -> SequenceClassification:
    task = SequenceClassification(options=options)
    task.learn(RECORDS)
    return task


def test_classes_are_learned_sorted() -> None:
    task = made()
    assert task.settings == {
        "objective": "classes",
        "classes": ["bad", "good"],
        "label_field": "label",
    }
    assert task.notes == ["labels from the column 'label', 2 classes: bad, good"]
    again = create("sequence-classification", settings=task.settings)
    assert again.model_settings() == {
        "num_labels": 2,
        "problem_type": "single_label_classification",
        "id2label": {0: "bad", 1: "good"},
        "label2id": {"bad": 0, "good": 1},
    }


def test_texts_are_cut_to_fit(tools: Tools) -> None:
    samples = made().encode(RECORDS, tools=tools)
    assert [sample["labels"] for sample in samples] == [1, 0, 1]
    assert all(len(sample["input_ids"]) <= 6 for sample in samples)
    assert len(tools.tokenizer.encode(RECORDS[1]["text"]).ids) > 6, "and the tokenizer is as before"


@pytest.mark.parametrize(
    ("options", "label", "value"),
    [({"objective": "binary"}, "good", 1), ({"objective": "number"}, "2.5", 2.5)],
)
def test_one_output(tools: Tools, options: dict[str, str], label: str, value: float) -> None:
    task = SequenceClassification(options=options)
    task.learn([{"text": "x", "label": label}, {"text": "y", "label": "0"}])
    assert task.model_settings()["num_labels"] == 1
    (sample,) = task.encode([{"text": "x", "label": label}], tools=tools)
    assert sample["labels"] == value and task.fields["labels"].dtype == "float32"


@pytest.mark.parametrize("objective", ["classes", "binary", "number"])
def test_losses_are_torchs_and_nothing_where_there_is_no_label(objective: str) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3 if objective == "classes" else 1, generator=draw, dtype=torch.float64)
    given = {"classes": [0, 2, 1], "binary": [0.0, 1.0, 1.0], "number": [0.5, -2.0, 3.0]}[objective]
    labels = torch.tensor([*given, IGNORED])
    found = _LOSSES[objective](logits, labels)
    kept, wanted = logits[:3], torch.tensor(given)
    oracle = {
        "classes": lambda: torch.nn.CrossEntropyLoss()(kept, wanted),
        "binary": lambda: torch.nn.BCEWithLogitsLoss()(kept[:, 0], wanted.double()),
        "number": lambda: torch.nn.MSELoss()(kept[:, 0], wanted.double()),
    }[objective]()
    assert found[3] == 0
    assert float(found.sum() / 3) == pytest.approx(float(oracle), rel=1e-12)


@pytest.mark.parametrize("objective", ["classes", "binary", "number"])
def test_an_exported_model_is_judged_by_its_own_objective(objective: str) -> None:
    """As `merge` judges it: of what transformers gives for one text, in plain torch."""
    logits = torch.tensor([[0.3, -1.0, 2.0]] if objective == "classes" else [[0.7]])
    labels = torch.tensor([{"classes": 2, "binary": 1.0, "number": 2.5}[objective]])
    task = SequenceClassification(options={"objective": objective})
    found = task.user_losses(SimpleNamespace(logits=logits), {"labels": labels})
    wanted = {
        "classes": -math.log(math.exp(2) / (math.exp(0.3) + math.exp(-1) + math.exp(2))),
        "binary": math.log(1 + math.exp(-0.7)),
        "number": (2.5 - 0.7) ** 2,
    }[objective]
    assert found == (pytest.approx(wanted, rel=1e-6), 1)


def test_scores_of_numbers() -> None:
    labels, guesses = np.array([1.0, 2.0, 4.0, 9.0]), np.array([1.5, 2.0, 3.0, 9.5])
    metrics = NumberMetrics()
    squares = torch.from_numpy((labels - guesses) ** 2)
    batch = {"labels": labels, "sample_ids": np.array([3, 1, 2, 0]), "source_ids": np.zeros(4)}
    metrics.add(batch=batch, scores=Scores(squares, torch.from_numpy(guesses)))
    found = metrics.result()
    variance = ((labels - labels.mean()) ** 2).sum()
    assert found["evaluation_loss"] == pytest.approx(((labels - guesses) ** 2).mean())
    assert found["mean_absolute_error"] == pytest.approx(np.abs(labels - guesses).mean())
    assert found["r2"] == pytest.approx(1 - ((labels - guesses) ** 2).sum() / variance)
    assert math.isnan(NumberMetrics().result()["evaluation_loss"])
    pairs = [[9.0, 9.5], [2.0, 2.0], [4.0, 3.0], [1.0, 1.5]]
    assert metrics.shown(metrics.vector(), metrics.examples) == {"pairs": pairs}, "by their ids"


def test_pictures_are_drawn(tmp_path: Path) -> None:
    task = made()
    metrics = task.metrics()
    batch = {"labels": np.array([0, 1, 1]), "sample_ids": np.arange(3)}
    metrics.add(batch=batch, scores=Scores(torch.zeros(3), torch.tensor([0, 0, 1])))
    shown = metrics.shown(metrics.vector(), [])
    assert shown == {"names": ["bad", "good"], "confusion": [[1, 0], [1, 1]]}
    for number, each in enumerate((shown, {"pairs": [[1.0, 2.0], [3.0, 2.5]]})):
        task.draw(each, tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5000


def test_macro_f1_by_hand() -> None:
    """Three of class 0 (two found), one of class 1 (found, and one of 0 taken for it)."""
    metrics = ClassMetrics(2)
    labels, guesses = np.array([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1])
    metrics.add(batch={"labels": labels}, scores=Scores(torch.zeros(4), guesses))
    assert metrics.result()["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("records", "options", "problem"),
    [
        ([{"text": "x", "mood": "y"}], {}, "no column of mood, text is called label, labels"),
        (
            [{"text": "x", "mood": "y"}],
            {"label_field": "mod"},
            r"(?s)no such column.*did you mean 'mood'",
        ),
        ([{"text": "x", "label": None}], {}, "expected a label in 'label', got None"),
        ([{"text": "x", "label": "y"}], {"objective": "binary"}, "needs two classes, got 1: y"),
    ],
)
def test_labels_that_are_none(records: Any, options: dict[str, str], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        SequenceClassification(options=options).learn(records)


def test_labels_outside_the_set(tools: Tools) -> None:
    with pytest.raises(DataError, match="the class 'odd' is not among the 2 known: bad, good"):
        made().encode([{"text": "x", "label": "odd"}], tools=tools)
    task = SequenceClassification(options={"objective": "number"})
    task.learn([{"text": "x", "label": 1}])
    with pytest.raises(DataError, match="expected a number in 'label', got 'many'"):
        task.encode([{"text": "x", "label": "many"}], tools=tools)
    with pytest.raises(DataError, match="expected a record with a string under 'text'"):
        task.encode([{"label": 1}], tools=tools)


def test_opinions_are_read_once_and_without_who_was_spoken_to(tmp_path: Path) -> None:
    path = tmp_path / "tweets.csv"
    path.write_bytes(
        b"sentiment,confidence,text\n"
        b"negative,1,@united you lost it https://t.co/x\n"
        b"negative,1,You  lost it\n"
        b"positive,1,fine \xff day\n"
        b"neutral,1,so so\nnegative,1,@me so so\n"
        b"neutral,1,@only\n"
    )
    assert list(read_opinions(path)) == [
        {"text": "you lost it", "label": "negative"},
        {"text": "fine \ufffd day", "label": "positive"},
    ]
