"""How well guessing by frequency does: the number that a trained model has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
_TRAIN, _VALIDATION = "train.counts", "validation.counts"


@dataclass(frozen=True)
class Counts:
    """How often each id is a target: int64 [vocabulary] of each part."""

    train: Ints
    validation: Ints

    def write(self, folder: Path) -> None:
        """Write both as little-endian int64 files."""
        self.train.astype("<i8").tofile(folder / _TRAIN)
        self.validation.astype("<i8").tofile(folder / _VALIDATION)

    @classmethod
    def read(cls, folder: Path) -> Counts:
        """Read what `write` wrote."""
        return cls(*(np.fromfile(folder / name, dtype="<i8") for name in (_TRAIN, _VALIDATION)))


def training_counts(counts: Sequence[Counts], *, size: int = 0) -> Ints:
    """Training counts of all sources together: int64 [V], V at least `size`."""
    total = np.zeros(max(size, *(len(one.train) for one in counts)), dtype=np.int64)
    for one in counts:
        total[: len(one.train)] += one.train
    return total


def nats(targets: Ints, *, train: Ints) -> float:
    """Mean of -log p(target) in nats, over targets given as how often each id is one [V].

    p(w) = (c(w) + 1) / (N + V): the training counts `train` [V] with one added to each id seen
    anywhere (Laplace), so that a word that training never shows has a finite loss. Zero when
    there are no targets.
    """
    if not targets.sum():
        return 0.0
    log_p = np.log(train + 1.0) - np.log(train.sum() + len(train))
    return float(-(targets * log_p[: len(targets)]).sum() / targets.sum())


def unigram_nats(counts: Sequence[Counts]) -> float:
    """`nats` of all validation targets of all sources."""
    train = training_counts(counts)
    validation = np.zeros_like(train)
    for one in counts:
        validation[: len(one.validation)] += one.validation
    return nats(validation, train=train)
