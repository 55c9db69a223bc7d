"""Scores that several tasks share: the mean loss; accuracy and macro F1 of classes."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from shoal.fields import IGNORED
from shoal.tasks.baselines import confusion_of, macro_f1
from shoal.tasks.task import Batch, Named, Scores, Vector, real_rows


class Examples:
    """The first examples of an evaluation, by the ids of their source and sample."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.found: list[tuple[int, int, Any]] = []
        """At most `most` of them, in the order of their ids."""

    def wants(self, batch: Batch, row: int) -> bool:
        """Whether this row of a batch would be kept: it has a place, and is no filling."""
        at = _ids(batch, row)
        return at[1] >= 0 and (len(self.found) < self.most or at < self.found[-1][:2])

    def keep(self, batch: Batch, row: int, example: Any) -> None:
        """Keep an example that is wanted, JSON-able; the last one makes room for it."""
        bisect.insort(self.found, (*_ids(batch, row), example), key=lambda each: each[:2])
        del self.found[self.most :]


def _ids(batch: Batch, row: int) -> tuple[int, int]:
    return int(batch["source_ids"][row]), int(batch["sample_ids"][row])


class MeanLoss:
    """Sums of loss and targets, of labels of any shape: [loss, targets]."""

    needs_predictions = False

    def __init__(self) -> None:
        self._sums = np.zeros(2)

    def add(self, *, batch: Batch, scores: Scores) -> None:
        """Count the losses [B, ...] (0 without a target), but for rows that only fill the batch."""
        rows = real_rows(batch)
        labels = np.asarray(batch["labels"])[rows]
        losses = np.asarray(scores.losses.double())[rows]
        targets = labels != IGNORED
        self._sums += [float((losses * targets).sum()), float(targets.sum())]

    def vector(self) -> Vector:
        """[loss, targets]."""
        return self._sums.copy()

    def result(self, vector: Vector | None = None) -> Named:
        """Mean loss per target, and the number of targets; NaN of none."""
        total, targets = (float(each) for each in (self._sums if vector is None else vector))
        return {
            "evaluation_loss": total / targets if targets else math.nan,
            "evaluation_targets": targets,
        }


class ClassMetrics:
    """Sums over samples: the loss, then how often class i was taken for class j [C, C]."""

    needs_predictions = True

    def __init__(self, num_classes: int) -> None:
        self._loss = 0.0
        self._confusion = np.zeros((num_classes, num_classes))

    def add(self, *, batch: Batch, scores: Scores) -> None:
        """Count losses and predictions [B] of the batch's `labels` [B]."""
        assert scores.predictions is not None, "classification is scored by its predictions"
        labels = np.asarray(batch["labels"])
        kept = real_rows(batch) & (labels != IGNORED)
        self._loss += float(np.asarray(scores.losses.double())[kept].sum())
        guesses = np.asarray(scores.predictions)[kept]
        self._confusion += confusion_of(labels[kept], guesses, len(self._confusion))

    def vector(self) -> Vector:
        """[loss, confusion row by row]."""
        return np.append(self._loss, self._confusion.ravel())

    def result(self, vector: Vector | None = None) -> Named:
        """Mean loss in nats, accuracy, and F1 averaged over the classes, of all samples counted."""
        sums = self.vector() if vector is None else vector
        confusion = sums[1:].reshape(self._confusion.shape)
        samples, right = confusion.sum(), np.diag(confusion)
        if not samples:
            return {"evaluation_loss": math.nan, "accuracy": math.nan, "evaluation_targets": 0.0}
        return {
            "evaluation_loss": float(sums[0] / samples),
            "accuracy": float(right.sum() / samples),
            "macro_f1": macro_f1(confusion),
            "evaluation_targets": float(samples),
        }


class NamedClassMetrics(ClassMetrics):
    """Sums of classes that have names, and their confusion matrix for a picture."""

    examples: Sequence[Sequence[Any]] = ()

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(len(names))
        self._names = list(names)

    def shown(self, vector: Vector, examples: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """What `pictures.draw_confusion` draws."""
        confusion = vector[1:].reshape(self._confusion.shape).tolist()
        return {"names": self._names, "confusion": confusion}
