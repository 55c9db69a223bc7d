"""Muon: momentum of matrices, orthogonalised in the precision of its run.

torch.optim.Muon orthogonalises in bfloat16 whatever it is given, so that a last-place difference of
a gradient turns over roundings of 2^-9: two replicas then part by 5e-5 within ten steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.775, 2.0315)
_ITERATIONS = 5
_SMALLEST_NORM = 1e-7
"""All as torch.optim.Muon has them (https://kellerjordan.github.io/posts/muon/)."""


def orthogonalised(matrix: Tensor, *, dtype: torch.dtype) -> Tensor:
    """`matrix` [R, C] with its singular values near 1, by Newton-Schulz in `dtype`; of that dtype.

    The iteration is quintic and does not converge: values end within 0.7 to 1.2, small ones below.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.to(dtype)
    found = found.T if is_tall else found
    found = found / found.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(_ITERATIONS):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T if is_tall else found


class Muon(torch.optim.Optimizer):
    """As torch.optim.Muon with Nesterov momentum, but for the precision of what is orthogonalised.

    Each parameter [R, C] has a `momentum_buffer` in its state before the first step.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        dtype: torch.dtype,
    ) -> None:
        """`dtype`: bfloat16 for a run that computes in it, else that of the parameters."""
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter against its orthogonalised momentum."""
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for each in group["params"]:
                average = self.state[each]["momentum_buffer"].lerp_(each.grad, 1 - momentum)
                update = orthogonalised(each.grad.lerp(average, momentum), dtype=self._dtype)
                scale = math.sqrt(max(1.0, each.shape[0] / each.shape[1]))
                each.mul_(1 - rate * group["weight_decay"]).add_(update, alpha=-rate * scale)
