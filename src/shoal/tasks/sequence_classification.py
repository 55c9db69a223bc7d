"""Giving each text a class, one of two, or a number: sentiment, topic, rating."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.errors import DataError, nearest
from shoal.fields import IGNORED, TOKENS, Field, Fields
from shoal.tasks.baselines import Labelled, logistic_regression
from shoal.tasks.pictures import draw_confusion, draw_numbers
from shoal.tasks.scores import Examples, NamedClassMetrics
from shoal.tasks.task import (
    NO_TOOLS,
    Batch,
    Curve,
    Evaluated,
    Metrics,
    Named,
    Output,
    Record,
    Sample,
    Scores,
    Task,
    Tools,
    Vector,
    real_rows,
    token_specimens,
    was,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal.models.anatomy import Anatomy

LABEL_FIELDS = ("label", "labels", "class", "sentiment", "category", "target", "score")
"""Where the label of a text is looked for, in this order."""

_FITTED_ON = 10_000  # texts that the baseline is fitted on at most
_WORDS = 4096  # tokens that it counts: the most frequent ones
_SHOWN = 500  # numbers in the picture


class SequenceClassification(Task):
    """One label per text, by the model's own head (a pooled state, or the first or last token's).

    `objective` classes: cross entropy of as many logits as there are classes; binary: one logit and
    the binary cross entropy; number: one output and the squared error.
    """

    kind = "sequence-classification"
    labels = "classes"
    auto_class = "AutoModelForSequenceClassification"
    runs_once = True
    target_name = "texts"
    picture = "labels.png"
    curve = Curve("loss per text", baseline="bag_of_words_loss", baseline_name="bag of words")
    own_data = "YOUR.csv"

    def __init__(
        self, settings: Mapping[str, Any] | None = None, *, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(settings, options=options)
        self._classes: list[str] = list(self.settings.get("classes", []))
        asked = self.options.get("objective", "classes")
        self._objective = str(self.settings.get("objective", asked))
        self._field: str | None = self.settings.get("label_field")

    @property
    def fields(self) -> Fields:
        """A row of tokens, and one label for it: a class, or a float32 for one output."""
        one = self._objective != "classes"
        label = Field("float32" if one else "int64", (), fill=IGNORED)
        # a decoder's head reads the last token that is not the padding token
        ids = replace(TOKENS["input_ids"], fill=self.settings.get("pad", 0))
        return {
            **{name: field for name, field in TOKENS.items() if name != "labels"},
            "input_ids": ids,
            "labels": label,
        }

    def learn(self, records: Iterable[Record], *, tools: Tools = NO_TOOLS) -> dict[str, Any]:
        """`{"classes": [...], "label_field": name}`, sorted; no classes where labels are numbers.

        Raises DataError where no column holds labels, or `binary` has other than two.
        """
        asked, found = self.options.get("label_field"), set[str]()
        for record in records:
            self._field = self._field or asked or _label_field(record)
            if self._objective != "number":
                found.add(str(_label(record, self._field)))
        self._classes = sorted(found)
        if self._objective == "binary" and len(found) != 2:
            shown = ", ".join(self._classes[:10])
            raise DataError(
                f"sequence-classification: task.objective binary needs two classes, got "
                f"{len(found)}: {shown}\n    use task.objective=classes"
            )
        self.settings = {
            "objective": self._objective,
            "classes": self._classes,
            "label_field": self._field,
            **_padding(tools),
        }
        said = f"{len(found)} classes: {', '.join(self._classes[:10])}" if found else "numbers"
        self.notes = [f"labels from the column {self._field!r}, {said}"]
        return self.settings

    def named_by(self, config: Mapping[str, Any], *, scored: bool) -> dict[str, Any]:
        """As every task; one output has no classes of its own to name."""
        if self._objective != "classes":
            return self.settings
        return super().named_by(config, scored=scored)

    def model_settings(self) -> dict[str, Any]:
        """num_labels, what kind of problem it is, and the names of the classes."""
        problem = {
            "classes": "single_label_classification",
            "binary": "multi_label_classification",
            "number": "regression",
        }[self._objective]
        if self._objective != "classes":  # of two classes, the one that the logit speaks for
            name = self._classes[1] if self._classes else "number"
            return {
                "num_labels": 1,
                "problem_type": problem,
                "id2label": {0: name},
                "label2id": {name: 0},
            }
        return {
            "num_labels": len(self._classes),
            "problem_type": problem,
            "id2label": dict(enumerate(self._classes)),
            "label2id": {name: index for index, name in enumerate(self._classes)},
        }

    def encode(self, records: Sequence[Record], *, tools: Tools) -> list[Sample]:
        """`{"text": str, LABEL: ...}` -> `input_ids` (cut to fit, special tokens kept), `labels`.

        Raises DataError for a label that `learn` has not seen, or that is no number.
        """
        texts = [_text(record) for record in records]
        tokenizer = tools.tokenizer
        tokenizer.no_padding()
        if tools.sequence_tokens is not None:
            tokenizer.enable_truncation(tools.sequence_tokens)
        samples = [
            {"input_ids": list(encoding.ids), "labels": self._value(record)}
            for encoding, record in zip(tokenizer.encode_batch(texts), records)
        ]
        tokenizer.no_truncation()
        return samples

    def _value(self, record: Record) -> float:
        label = _label(record, str(self._field))
        if self._objective == "number":
            try:
                value = float(label)
            except (TypeError, ValueError):
                value = math.nan
            if not math.isfinite(value):
                raise DataError(
                    f"sequence-classification: expected a number in {self._field!r}, got "
                    f"{str(label)[:40]!r}\n    use task.objective=classes, or mend the data"
                )
            return value
        if str(label) not in self._classes:
            raise DataError(
                f"sequence-classification: the class {str(label)[:40]!r} is not among the "
                f"{len(self._classes)} known: {', '.join(self._classes[:20])}"
            )
        return self._classes.index(str(label))

    def specimens(self, config: Any) -> list[Sample]:
        """Texts of unequal length, with a label for each."""
        samples = token_specimens(config)
        for number, sample in enumerate(samples):
            known = max(1, len(self._classes))
            sample["labels"] = {
                "classes": number % known,
                "binary": float(number % 2),
                "number": number / 3,
            }[self._objective]
        return samples

    def user_call(self, batch: Batch) -> dict[str, Tensor]:
        """One output has labels [B, 1] for a binary cross entropy, as transformers asks for."""
        call = super().user_call(batch)
        labels = call["labels"]
        if self._objective != "classes":
            labels = labels.to(batch["input_ids"].new_zeros(()).double().dtype)
        return {**call, "labels": labels[:, None] if self._objective == "binary" else labels}

    def user_losses(self, made: Any, batch: Batch, *, evaluated: bool = False) -> tuple[float, int]:
        """By the objective."""
        losses = _LOSSES[self._objective](made.logits.double(), batch["labels"])
        return float(losses.sum()), self.count(batch)

    def output(self, model: nn.Module, anatomy: Anatomy, batch: Batch, *, step: int = 0) -> Output:
        """The logits [B, C], which are the model's own, and the label of each text [B]."""
        from shoal.models.anatomy import hidden_of, logits_of
        from shoal.tasks.losses import Summed

        head, losses, guess = logits_of(model), _LOSSES[self._objective], _GUESSES[self._objective]
        return Output(
            hidden=hidden_of(model, dict(batch), step=step),
            fields={"labels": batch["labels"]},
            loss=Summed(
                lambda hidden, fields: losses(head(hidden), fields["labels"]),
                guess=lambda hidden, fields: guess(head(hidden)),
            ),
        )

    def metrics(self) -> Metrics:
        """A fresh accumulator."""
        if self._objective == "number":
            return NumberMetrics()
        return NamedClassMetrics(self._classes)

    def draw(self, shown: Mapping[str, Any], path: Path) -> None:
        """The confusion matrix; of numbers, what was said against what is."""
        (draw_numbers if "pairs" in shown else draw_confusion)(shown, path)

    def baseline(self, data: Evaluated) -> Named:
        """Macro F1 and loss of logistic regression on which tokens a text has; of numbers, the
        squared error of the mean of the training part."""
        train = list(itertools.islice(data.training_rows(), _FITTED_ON))
        rows = list(data.rows())
        if self._objective == "number":
            mean = float(np.mean([row["labels"] for row in train]))
            return {"mean_loss": float(np.mean([(row["labels"] - mean) ** 2 for row in rows]))}
        counts = np.bincount(np.concatenate([np.unique(row["input_ids"]) for row in train]))
        kept = np.argsort(-counts, kind="stable")[:_WORDS]
        learned, scored = (
            Labelled.of(
                [(np.isin(kept, row["input_ids"]), int(row["labels"])) for row in part], scale=1
            )
            for part in (train, rows)
        )
        found = logistic_regression(learned, scored=scored, num_classes=len(self._classes))
        return dict(zip(("bag_of_words_accuracy", "bag_of_words_loss", "bag_of_words_f1"), found))

    def words(self, before: Named | None, after: Named) -> list[str]:
        """Macro F1 (of numbers, the share of the variance) before and after, and the baseline's."""
        if self._objective == "number":
            return [
                f"squared error: {was(before, 'evaluation_loss', 3)}"
                f"{after['evaluation_loss']:.3f} now; always the mean: {after['mean_loss']:.3f}"
            ]
        return [
            f"macro F1: {was(before, 'macro_f1', 3)}{after['macro_f1']:.3f} now (accuracy "
            f"{after['accuracy']:.3f}); logistic regression on the words: "
            f"{after['bag_of_words_f1']:.3f} (accuracy {after['bag_of_words_accuracy']:.3f})"
        ]


class NumberMetrics:
    """Sums over texts: squared errors, absolute errors, texts, their numbers, and squares."""

    needs_predictions = True

    def __init__(self) -> None:
        self._sums = np.zeros(5)
        self._kept = Examples(_SHOWN)

    def add(self, *, batch: Batch, scores: Scores) -> None:
        """Count the squared errors and predictions [B] of the batch's `labels` [B]."""
        assert scores.predictions is not None, "numbers are scored by the predictions"
        kept = real_rows(batch)
        labels = np.asarray(batch["labels"], dtype=np.float64)[kept]
        guesses = np.asarray(scores.predictions.double())[kept]
        squares = np.asarray(scores.losses.double())[kept].sum()
        for row in np.flatnonzero(kept):
            if self._kept.wants(batch, int(row)):
                pair = [float(batch["labels"][row]), float(scores.predictions[row])]
                self._kept.keep(batch, int(row), pair)
        sums = [squares, np.abs(guesses - labels).sum(), len(labels)]
        self._sums += [*sums, labels.sum(), np.square(labels).sum()]

    def vector(self) -> Vector:
        """All sums in one vector (see the class)."""
        return self._sums.copy()

    @property
    def examples(self) -> Sequence[Sequence[Any]]:
        """The first texts: number, guess."""
        return self._kept.found

    def shown(self, vector: Vector, examples: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Pairs of a number and the guess."""
        return {"pairs": [example for _, _, example in examples[:_SHOWN]]}

    def result(self, vector: Vector | None = None) -> Named:
        """The mean squared and absolute error, and R2: the share of the variance explained."""
        squares, absolute, count, total, square = (
            float(each) for each in (self._sums if vector is None else vector)
        )
        if not count:
            return {"evaluation_loss": math.nan, "evaluation_targets": 0.0}
        variance = square - total * total / count
        return {
            "evaluation_loss": squares / count,
            "mean_absolute_error": absolute / count,
            "r2": 1 - squares / variance if variance > 0 else math.nan,
            "evaluation_targets": count,
        }


def _padding(tools: Tools) -> dict[str, int]:
    """The id of the padding token, where the tokenizer has one."""
    text = tools.special_texts.get("pad_token")
    found = None if text is None else tools.tokenizer.token_to_id(text)
    return {} if found is None else {"pad": found}


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, labels, reduction="none")  # 0 where the label is ignored


def _binary(logits: Tensor, labels: Tensor) -> Tensor:
    from torch.nn.functional import binary_cross_entropy_with_logits

    kept = labels != IGNORED
    wanted = labels.to(logits.dtype).where(kept, labels.new_zeros(()).to(logits.dtype))
    return binary_cross_entropy_with_logits(logits[:, 0], wanted, reduction="none") * kept


def _squared(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits[:, 0] - labels.to(logits.dtype)).square() * (labels != IGNORED)


_LOSSES = {"classes": _cross_entropy, "binary": _binary, "number": _squared}
_GUESSES = {
    "classes": lambda logits: logits.argmax(dim=-1),
    "binary": lambda logits: (logits[:, 0] > 0).long(),
    "number": lambda logits: logits[:, 0],
}


def _text(record: Record) -> str:
    text = record.get("text")
    if not isinstance(text, str):
        raise DataError(
            f"sequence-classification: expected a record with a string under 'text', got keys "
            f"{sorted(record)}\n    name the column that holds the text (data.text_field)"
        )
    return text


def _label_field(record: Record) -> str:
    for name in LABEL_FIELDS:
        if name in record:
            return name
    raise DataError(
        f"sequence-classification: no column of {', '.join(sorted(record))} is called "
        f"{', '.join(LABEL_FIELDS)}\n    name the one that holds the labels (task.label_field)"
    )


def _label(record: Record, name: str) -> Any:
    label = record.get(name)
    if label is None or isinstance(label, (list, dict)) or label == "":
        known = f"its columns: {', '.join(sorted(record))}; {nearest(name, record)}"
        raise DataError(
            f"sequence-classification: expected a label in {name!r}, got "
            f"{'no such column' if name not in record else repr(label)[:40]} in the text that "
            f"begins {str(record.get('text'))[:30]!r}\n    {known}"
        )
    return label
