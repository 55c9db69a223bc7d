"""Scores of samples that belong to one class each: loss, accuracy and macro F1; and a baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.fields import IGNORED
from shoal.tasks.task import Batch, Named, Scores, Vector, real_rows


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
        np.add.at(self._confusion, (labels[kept], np.asarray(scores.predictions)[kept]), 1)

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
        both = confusion.sum(axis=0) + confusion.sum(axis=1)
        f1 = 2 * right[both > 0] / both[both > 0]  # a class that is nowhere has no F1
        return {
            "evaluation_loss": float(sums[0] / samples),
            "accuracy": float(right.sum() / samples),
            "macro_f1": float(f1.mean()),
            "evaluation_targets": float(samples),
        }


@dataclass(frozen=True)
class Labelled:
    """Samples as rows of numbers [N, F], and the class of each [N]."""

    inputs: NDArray[np.float32]
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[tuple[NDArray[Any], int]], *, scale: float) -> Labelled:
        """From arrays of any one shape and their classes; the inputs are divided by `scale`."""
        inputs = np.stack([np.asarray(array, dtype=np.float32).ravel() for array, _ in rows])
        return cls(inputs / np.float32(scale), np.array([label for _, label in rows]))


def logistic_regression(
    train: Labelled, *, scored: Labelled, num_classes: int, steps: int = 100
) -> tuple[float, float]:
    """(accuracy, mean loss in nats) of a linear classifier on `scored`, fitted on `train`.

    What scikit-learn's LogisticRegression does as it comes: the summed cross entropy and half the
    squared weights (not the biases), by at most `steps` steps of L-BFGS, from zero.
    """
    import torch
    from torch.nn.functional import cross_entropy

    inputs, labels = torch.from_numpy(train.inputs), torch.from_numpy(train.labels)
    weight = torch.zeros(num_classes, inputs.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    # the line search keeps every step a descent, as scipy's does
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(inputs @ weight.T + bias, labels, reduction="sum")
        loss = (loss + 0.5 * weight.square().sum()) / len(labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call, arg-type]
    with torch.no_grad():
        logits = torch.from_numpy(scored.inputs) @ weight.T + bias
        answers = torch.from_numpy(scored.labels)
        accuracy = (logits.argmax(dim=1) == answers).double().mean()
        return float(accuracy), float(cross_entropy(logits, answers))
