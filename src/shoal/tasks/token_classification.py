"""Tagging tokens, such as named entities: one label per word. Scores: entity F1 the CoNLL way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.errors import DataError
from shoal.fields import IGNORED
from shoal.tasks.baselines import confusion_of
from shoal.tasks.causal_lm import classify_tokens
from shoal.tasks.lookup import Dictionary
from shoal.tasks.pictures import draw_confusion
from shoal.tasks.scores import NamedClassMetrics
from shoal.tasks.spans import (
    as_bio2,
    is_reversed,
    precision_recall_f1,
    scheme_of,
    spans_of,
    split_tag,
)
from shoal.tasks.task import (
    NO_TOOLS,
    Batch,
    Curve,
    Evaluated,
    Named,
    Output,
    Record,
    Sample,
    Scores,
    Task,
    Tools,
    Vector,
    labels_of,
    real_rows,
    was,
)

if TYPE_CHECKING:
    from torch import nn

    from shoal.models.anatomy import Anatomy

_READ_FOR_NAMES = 50_000  # sentences of the training part that the baseline looks for names in


class TokenClassification(Task):
    """One tag per word, carried by the word's first piece; the other pieces have no target.

    Tags of entities are read as BIO2, whatever scheme they come in; tags without any prefix are
    plain classes, which are scored word by word.
    """

    kind = "token-classification"
    reads_words = True
    labels = "tags"
    auto_class = "AutoModelForTokenClassification"
    runs_once = True
    target_name = "target words"
    picture = "confusion.png"
    curve = Curve("nats per word")
    own_data = "YOUR.conll"

    def __init__(
        self, settings: Mapping[str, Any] | None = None, *, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(settings, options=options)
        self._tags: list[str] = list(self.settings.get("tags", []))
        self._reversed = bool(self.settings.get("reversed", False))

    def learn(self, records: Iterable[Record], *, tools: Tools = NO_TOOLS) -> dict[str, Any]:
        """`{"tags": [...]}`: every tag of the data in BIO2, sorted, O first. Remembered as well.

        `reversed` is among them where prefixes stand behind. `notes` say what was translated.
        Raises DataError for tags of which only some have a prefix.
        """
        pairs = {
            pair for record in records for pair in pairwise(["O", *_words_and_tags(record)[1]])
        }
        given = {tag for _, tag in pairs}
        behind = is_reversed(given)
        self._reversed = bool(behind)
        changed = {}
        if behind is not None:
            read = {pair: as_bio2(pair[1], after=pair[0], reversed_=behind) for pair in pairs}
            changed = {tag: new for (_, tag), new in sorted(read.items()) if tag != new}
            found = set(read.values())
        else:
            found = given
        self._tags = sorted(found, key=lambda tag: (tag != "O", tag))
        self.notes = self._notes_on(given, changed=changed)
        self.settings = {"tags": self._tags, **({"reversed": True} if behind else {})}
        return self.settings

    def _notes_on(self, given: set[str], *, changed: Mapping[str, str]) -> list[str]:
        if changed:
            name = scheme_of(given, reversed_=self._reversed)
            shown = ", ".join(f"{tag} as {new}" for tag, new in [*changed.items()][:3])
            return [f"tags ({name}) are read as BIO2: {shown}"]
        if self.is_plain:
            numbers = all(tag.isdigit() for tag in given)
            hint = "; the data does not say what the numbers mean" if numbers else ""
            return [f"tags have no B- or I-: plain classes, scored word by word{hint}"]
        return [] if len(self._tags) > 1 else ["all words are tagged O: there is nothing to find"]

    def named_by(self, config: Mapping[str, Any], *, scored: bool) -> dict[str, Any]:
        """As every task; raises DataError too for a scored model of BIOES or BILOU tags."""
        other = [tag for tag in labels_of(config) if split_tag(tag)[0] not in ("", "B", "I")]
        if scored and other and not self.is_plain:
            raise DataError(
                f"token-classification: the model gives tags of {scheme_of(other, reversed_=False)}"
                f", such as {other[0]!r}; expected BIO2 (B-X, I-X, O), as data is read\n"
                "    train it on this data first, which gives it tags of BIO2"
            )
        return super().named_by(config, scored=scored)

    @property
    def is_plain(self) -> bool:
        """Whether no tag has a prefix: classes of words, and no entities."""
        return is_reversed(self._tags) is None

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
        spaced = is_byte_level(tokenizer)
        inputs = [[_spaced(word) if spaced else word for word in words] for words, _ in pairs]
        encodings = tokenizer.encode_batch(inputs, is_pretokenized=True)
        plain = self.is_plain
        samples = []
        for (_, tags), encoding in zip(pairs, encodings):
            if not plain:
                tags = [
                    as_bio2(tag, after=before, reversed_=self._reversed)
                    for before, tag in pairwise(["O", *tags])
                ]
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

    def metrics(self) -> TagMetrics | WordMetrics:
        """A fresh accumulator for the tags learned."""
        return WordMetrics(self._tags) if self.is_plain else TagMetrics(self._tags)

    def draw(self, shown: Mapping[str, Any], path: Path) -> None:
        """How often a word of one type was taken for one of another."""
        draw_confusion(shown, path)

    def baseline(self, data: Evaluated) -> Named:
        """`dictionary_f1`: of looking up the names of the training part (tasks/lookup.py)."""
        if self.is_plain:
            return {}
        rows = list(itertools.islice(data.training_rows(), _READ_FOR_NAMES))
        return {"dictionary_f1": Dictionary(rows, tags=self._tags).f1(data.rows())}

    def words(self, before: Named | None, after: Named) -> list[str]:
        """Entity F1 (accuracy of plain classes) before and after, beside that of the names of the
        training part looked up, and the majority tag's."""
        name, text = ("accuracy", "accuracy") if self.is_plain else ("entity_f1", "entity F1")
        guess = after["majority_tag_accuracy" if self.is_plain else "majority_tag_f1"]
        known = after.get("dictionary_f1")
        beside = "" if known is None else f"names of the training part looked up: {known:.3f}; "
        lines = [
            f"{text}: {was(before, name, 3)}{after[name]:.3f} now; {beside}the most "
            f"frequent tag for every word: {guess:.3f}"
        ]
        if after.get("entity_f1") == 0:
            right = after["token_accuracy"]
            lines.append(
                f"no entity was found as a whole, though {right:.1%} of the tags are right"
            )
        return lines


class WordMetrics(NamedClassMetrics):
    """Words as samples of plain classes: [loss, how often class i was taken for class j]."""

    def add(self, *, batch: Batch, scores: Scores) -> None:
        """Count a batch's losses and predictions [B, T]; rows that only fill it do not count."""
        assert scores.predictions is not None, "token classification is scored by its predictions"
        rows = real_rows(batch)
        losses, guesses = (each[rows].reshape(-1) for each in (scores.losses, scores.predictions))
        labels = np.asarray(batch["labels"])[rows].reshape(-1)
        super().add(batch={"labels": labels}, scores=Scores(losses, guesses))

    def result(self, vector: Vector | None = None) -> Named:
        """Loss per word, accuracy, macro F1, and the accuracy of the most frequent tag."""
        scores = super().result(vector)
        sums = self.vector() if vector is None else vector
        size = len(self._confusion)
        gold = sums[1:].reshape(size, size).sum(axis=1)
        if not gold.sum():
            return scores
        return {**scores, "majority_tag_accuracy": float(gold.max() / gold.sum())}


class TagMetrics:
    """Sums over words and sentences.

    Layout: [loss, words, correct words, correct spans, predicted spans, gold spans], then three
    counts per tag for the baseline that gives every word the most frequent tag: words with the
    tag, spans it would predict, spans it would get right; then how often a word
    of type i was taken for one of type j, whatever its prefix: O and the types, sorted.
    """

    needs_predictions = True

    def __init__(self, tags: list[str]) -> None:
        self._tags = tags
        self._sums = np.zeros(6)
        self._words = np.zeros(len(tags))
        self._baseline_predicted = np.zeros(len(tags))
        self._baseline_correct = np.zeros(len(tags))
        self._types = ["O", *sorted({split_tag(tag)[1] for tag in tags} - {""})]
        names = [split_tag(tag)[1] or "O" for tag in tags]
        self._type_of = np.array([self._types.index(name) for name in names])
        self._confusion = np.zeros((len(self._types), len(self._types)))

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
        is_, said = (self._type_of[each.astype(np.int64)] for each in (gold, guess))
        self._confusion += confusion_of(is_, said, len(self._types))
        self._sums += [loss, len(gold), right, correct, len(found), len(wanted)]
        self._words += np.bincount(gold.astype(np.int64), minlength=len(self._tags))
        for index, tag in enumerate(self._tags):
            constant = spans_of([tag] * len(gold))
            self._baseline_predicted[index] += len(constant)
            self._baseline_correct[index] += len(set(wanted) & set(constant))

    def vector(self) -> Vector:
        """All sums in one vector (see the class)."""
        per_tag = (self._words, self._baseline_predicted, self._baseline_correct)
        return np.concatenate([self._sums, *per_tag, self._confusion.ravel()])

    examples: Sequence[Sequence[Any]] = ()

    def shown(self, vector: Vector, examples: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """What `pictures.draw_confusion` draws."""
        confusion = vector[-self._confusion.size :].reshape(self._confusion.shape)
        return {"names": self._types, "confusion": confusion.tolist()}

    def result(self, vector: Vector | None = None) -> Named:
        """Loss per word, entity precision, recall and F1, word accuracy, and the majority tag's."""
        sums = self.vector() if vector is None else vector
        loss, words, right, correct, predicted, gold = (float(each) for each in sums[:6])
        per_tag = sums[6 : 6 + 3 * len(self._tags)].reshape(3, -1)
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
            f"{sorted(record)}\n    rename the columns that hold them, or use another task.kind"
        )
    if len(words) != len(tags):
        raise DataError(
            f"token-classification: {len(words)} words but {len(tags)} tags in the record that "
            f"begins {' '.join(map(str, words[:5]))!r}\n    expected one tag per word"
        )
    return words, tags


def is_byte_level(tokenizer: Any) -> bool:
    """Whether a space belongs to the word behind it, as GPT-2, RoBERTa and Llama 3 have it."""
    rule = tokenizer.pre_tokenizer
    return rule is not None and b'"ByteLevel"' in rule.__getstate__()


def _spaced(word: str) -> str:
    """A word as it stands in a text, where byte-level tokenizers have learned it."""
    return f" {word}" if word and not word.startswith(" ") else word


def _label(tag: str, ids: dict[str, int]) -> int:
    if tag not in ids:
        raise DataError(
            f"token-classification: the tag {tag!r} is not among the {len(ids)} tags known: "
            f"{', '.join(ids)}\n    let the task learn its tags from all parts of the data"
        )
    return ids[tag]
