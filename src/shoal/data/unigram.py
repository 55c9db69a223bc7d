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


def unigram_nats(counts: Sequence[Counts]) -> float:
    """Mean of -log p(target) over the validation targets of all sources, in nats.

    p(w) = (c(w) + 1) / (N + V): training counts with one added to each of the V ids seen anywhere
    up to the largest (Laplace), so that a word that training never shows has a finite loss.
    Zero when there are no validation targets.
    """
    vocabulary = max(len(one.train) for one in counts)
    train = np.zeros(vocabulary, dtype=np.int64)
    validation = np.zeros(vocabulary, dtype=np.int64)
    for one in counts:
        train[: len(one.train)] += one.train
        validation[: len(one.validation)] += one.validation
    if not validation.sum():
        return 0.0
    log_p = np.log(train + 1.0) - np.log(train.sum() + vocabulary)
    return float(-(validation * log_p).sum() / validation.sum())
