"""How often each label is a target: what the simplest baselines are made of."""

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
    """How often each label is a target: int64 [labels] of each part."""

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


def training_counts(counts: Sequence[Counts]) -> Ints:
    """Training counts of all sources together: int64 [labels]."""
    total = np.zeros(max(len(one.train) for one in counts), dtype=np.int64)
    for one in counts:
        total[: len(one.train)] += one.train
    return total
