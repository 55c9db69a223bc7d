"""Tagging tokens, such as named entities: one label per word. Scores: entity F1 the CoNLL way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.errors import DataError
from shoal.fields import IGNORED
from shoal.tasks.causal_lm import classify_tokens
from shoal.tasks.spans import precision_recall_f1, spans_of
from shoal.tasks.task import (
    Batch,
    Curve,
    Named,
    Output,
    Record,
    Sample,
    Scores,
    Task,
    Tools,
    Vector,
    real_rows,
    was,
)

if TYPE_CHECKING:
    from torch import nn

    from shoal.models.anatomy import Anatomy


class TokenClassification(Task):
    """One tag per word, carried by the word's first piece; the other pieces have no target."""

    kind = "token-classification"
    auto_class = "AutoModelForTokenClassification"
    target_name = "target words"
    curve = Curve("nats per word")
    own_data = "YOUR.conll"

    def __init__(
        self, settings: Mapping[str, Any] | None = None, *, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(settings, options=options)
        self._tags: list[str] = list(self.settings.get("tags", []))

    def learn(self, records: Iterable[Record]) -> dict[str, Any]:
        """`{"tags": [...]}`: every tag of the data, sorted, O first. Remembered as well."""
        found = {tag for record in records for tag in _words_and_tags(record)[1]}
        self._tags = sorted(found, key=lambda tag: (tag != "O", tag))
        self.settings = {"tags": self._tags}
        return self.settings

    def model_settings(self) -> dict[str, Any]:
        """num_labels, id2label and label2id for the model's configuration."""
        return {
            "num_labels": len(self._tags),
            "id2label": dict(enumerate(self._tags)),
            "label2id": {tag: index for index, tag in enumerate(self._tags)},
        }

    def encode(self, records: Sequence[Record], *, tools: Tools) -> list[Sample]:
        """`{"words": [...], "tags": [...]}` -> `input_ids` and `labels`, of the same length.

        Raises DataError for a record whose words and tags differ in number, or a tag that
        `learn` has not seen.
        """
        pairs = [_words_and_tags(record) for record in records]
        ids = {tag: index for index, tag in enumerate(self._tags)}
        tokenizer = tools.tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        encodings = tokenizer.encode_batch([words for words, _ in pairs], is_pretokenized=True)
        samples = []
        for (_, tags), encoding in zip(pairs, encodings):
            labels, previous = [], None
            for word in encoding.word_ids:
                first = word is not None and word != previous
                labels.append(_label(tags[word], ids) if first else IGNORED)
                previous = word
            samples.append({"input_ids": list(encoding.ids), "labels": labels})
        return samples

    def output(self, model: nn.Module, anatomy: Anatomy, batch: Batch, *, step: int = 0) -> Output:
        """Hidden states [B, T, D] and labels [B, T]."""
        return classify_tokens(model, batch, step=step)

    def metrics(self) -> TagMetrics:
        """A fresh accumulator for the tags learned."""
        return TagMetrics(self._tags)

    def words(self, before: Named | None, after: Named) -> list[str]:
        """Entity F1 before and after, beside that of the most frequent tag."""
        return [
            f"entity F1: {was(before, 'entity_f1', 3)}{after['entity_f1']:.3f} now; the most "
            f"frequent tag for every word: {after['majority_tag_f1']:.3f}"
        ]


class TagMetrics:
    """Sums over words and sentences.

    Layout: [loss, words, correct words, correct spans, predicted spans, gold spans], then three
    counts per tag for the baseline that gives every word the most frequent tag: words with the
    tag, spans it would predict, spans it would get right.
    """

    needs_predictions = True

    def __init__(self, tags: list[str]) -> None:
        self._tags = tags
        self._sums = np.zeros(6)
        self._words = np.zeros(len(tags))
        self._baseline_predicted = np.zeros(len(tags))
        self._baseline_correct = np.zeros(len(tags))

    def add(self, *, batch: Batch, scores: Scores) -> None:
        """Count a batch's losses and predictions [B, T]; rows that only fill it do not count."""
        assert scores.predictions is not None, "token classification is scored by its predictions"
        labels, guesses = np.asarray(batch["labels"]), np.asarray(scores.predictions)
        loss = np.asarray(scores.losses.double())
        for row in np.flatnonzero(real_rows(batch)):
            chosen = labels[row] != IGNORED
            self._sentence(labels[row][chosen], guesses[row][chosen], loss[row][chosen].sum())

    def _sentence(self, gold: Vector, guess: Vector, loss: float) -> None:
        wanted = spans_of([self._tags[int(each)] for each in gold])
        found = spans_of([self._tags[int(each)] for each in guess])
        correct = len(set(wanted) & set(found))
        right = float((gold == guess).sum())
        self._sums += [loss, len(gold), right, correct, len(found), len(wanted)]
        self._words += np.bincount(gold.astype(np.int64), minlength=len(self._tags))
        for index, tag in enumerate(self._tags):
            constant = spans_of([tag] * len(gold))
            self._baseline_predicted[index] += len(constant)
            self._baseline_correct[index] += len(set(wanted) & set(constant))

    def vector(self) -> Vector:
        """All sums in one vector (see the class)."""
        per_tag = (self._words, self._baseline_predicted, self._baseline_correct)
        return np.concatenate([self._sums, *per_tag])

    def result(self, vector: Vector | None = None) -> Named:
        """Loss per word, entity precision, recall and F1, word accuracy, and the majority tag's."""
        sums = self.vector() if vector is None else vector
        loss, words, right, correct, predicted, gold = (float(each) for each in sums[:6])
        per_tag = sums[6:].reshape(3, -1)
        if not words:
            return {"evaluation_loss": math.nan, "entity_f1": math.nan, "evaluation_targets": 0.0}
        precision, recall, f1 = precision_recall_f1(correct=correct, predicted=predicted, gold=gold)
        most = int(per_tag[0].argmax())
        majority = precision_recall_f1(
            correct=float(per_tag[2][most]), predicted=float(per_tag[1][most]), gold=gold
        )
        return {
            "evaluation_loss": loss / words,
            "entity_precision": precision,
            "entity_recall": recall,
            "entity_f1": f1,
            "token_accuracy": right / words,
            "majority_tag_f1": majority[2],
            "majority_tag_accuracy": float(per_tag[0][most]) / words,
            "evaluation_targets": words,
        }


def _words_and_tags(record: Record) -> tuple[list[str], list[str]]:
    words, tags = record.get("words"), record.get("tags")
    if not isinstance(words, list) or not isinstance(tags, list):
        raise DataError(
            "token-classification: expected a record with lists under 'words' and 'tags', got keys "
            f"{sorted(record)}\n    name the columns that hold them, or use another task.kind"
        )
    if len(words) != len(tags):
        raise DataError(
            f"token-classification: {len(words)} words but {len(tags)} tags in the record that "
            f"begins {' '.join(map(str, words[:5]))!r}\n    expected one tag per word"
        )
    return words, tags


def _label(tag: str, ids: dict[str, int]) -> int:
    if tag not in ids:
        raise DataError(
            f"token-classification: the tag {tag!r} is not among the {len(ids)} tags known: "
            f"{', '.join(ids)}\n    let the task learn its tags from all parts of the data"
        )
    return ids[tag]
