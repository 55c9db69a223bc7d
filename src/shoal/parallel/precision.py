"""Number formats of the computation: float32 weights, and matrix products in a smaller format.

Weights, optimizer state and every reduction of gradients stay in float32: `autocast` gives each
product a smaller copy of its operands (Micikevicius et al., arXiv 1710.03740). float16 has too few
exponents for gradients, so their loss is scaled (`LossScale`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from shoal.errors import UserError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def compute_context(
    dtype: torch.dtype, *, device: torch.device
) -> AbstractContextManager[torch.autocast | None]:
    """A context in which matrix products run in `dtype`; float32 changes nothing."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def check_compute(name: str, *, device: torch.device) -> torch.dtype:
    """The dtype of `precision.compute`. Raises UserError for float16 on a CPU."""
    if name == "float16" and device.type == "cpu":
        raise UserError("precision.compute: float16 needs a GPU, got a CPU; use float32 there")
    return DTYPES[name]


@dataclass
class LossScale:
    """The factor of the loss that keeps float16 gradients from vanishing; a power of two.

    It halves when a step's gradients overflow (that step is skipped on all ranks: the norm that
    decides is the same on all), and doubles after `patience` steps without. Dividing by a power of
    two is exact, so a step that is taken is the step without scaling. `value` and `steps` are state
    for checkpoints.
    """

    value: float = 65536.0
    steps: int = 0
    patience: int = 2000

    @classmethod
    def of(cls, dtype: torch.dtype) -> LossScale | None:
        """A scale for float16, None for formats that need none."""
        return cls() if dtype == torch.float16 else None

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it, and a rank that joins is told."""
        return {"value": self.value, "steps": self.steps}

    def restore(self, state: Mapping[str, float]) -> None:
        """Stand where `state` says."""
        self.value, self.steps = float(state["value"]), int(state["steps"])

    def update(self, *, overflowed: bool) -> None:
        """Take note of a step."""
        if overflowed:
            self.value, self.steps = max(1.0, self.value / 2), 0
            return
        self.steps += 1
        if self.steps == self.patience:
            self.value, self.steps = self.value * 2, 0

    def __post_init__(self) -> None:
        if self.value < 1 or math.frexp(self.value)[0] != 0.5:
            raise ValueError(f"loss scale: expected a power of two of at least 1, got {self.value}")
