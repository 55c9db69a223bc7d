"""The simplest things one would do instead: what a trained model has to beat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


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
) -> tuple[float, float, float]:
    """(accuracy, loss in nats, macro F1) of a linear classifier on `scored`, fitted on `train`.

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
        guesses = logits.argmax(dim=1)
        accuracy = (guesses == answers).double().mean()
        loss = float(cross_entropy(logits, answers))
    return (
        float(accuracy),
        loss,
        macro_f1(confusion_of(answers.numpy(), guesses.numpy(), num_classes)),
    )


def confusion_of(labels: NDArray[Any], guesses: NDArray[Any], size: int) -> NDArray[np.float64]:
    """How often class i was taken for class j [size, size]."""
    confusion = np.zeros((size, size))
    np.add.at(confusion, (labels.astype(np.int64), guesses), 1)
    return confusion


def macro_f1(confusion: NDArray[np.float64]) -> float:
    """F1 averaged over the classes that are anywhere."""
    right, both = np.diag(confusion), confusion.sum(axis=0) + confusion.sum(axis=1)
    return float((2 * right[both > 0] / both[both > 0]).mean())


def unigram_nats(targets: NDArray[np.int64], *, train: NDArray[np.int64]) -> float:
    """Mean of -log p(target) in nats, over targets given as how often each id is one [V].

    p(w) = (c(w) + 1) / (N + V): the training counts `train` [V] with one added to each id seen
    anywhere (Laplace), so that a word that training never shows has a finite loss. NaN when there
    are no targets.
    """
    if not targets.sum():
        return math.nan
    log_p = np.log(train + 1.0) - np.log(train.sum() + len(train))
    return float(-(targets * log_p[: len(targets)]).sum() / targets.sum())
