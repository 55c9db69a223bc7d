"""Muon: momentum of matrices, orthogonalised in the precision of its run.

torch.optim.Muon orthogonalises in bfloat16 whatever it is given, so that a last-place difference of
a gradient turns over roundings of 2^-9: two replicas then part by 5e-5 within ten steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shoal.parallel.whole import Wholes

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

    Each parameter [R, C], or this rank's part of it, has a `momentum_buffer` in its state before
    the first step.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        dtype: torch.dtype,
        names: Sequence[str] = (),
        wholes: Wholes | None = None,
    ) -> None:
        """`dtype`: bfloat16 for a run that computes in it, else that of the parameters.

        `names` of the parameters, and `wholes`, where each rank has a part of every one.
        """
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self._dtype, self._names, self._wholes = dtype, names, wholes

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter against its orthogonalised momentum.

        Raises PeersLost, before anything is changed.
        """
        for group in self.param_groups:
            orthogonal = partial(orthogonalised, dtype=self._dtype)
            if self._wholes is None:
                for each in group["params"]:
                    self._move(each, orthogonal(self._direction(each, group)), group, each.shape)
                continue
            params = dict(zip(self._names, group["params"], strict=True))
            parts = {name: self._direction(each, group) for name, each in params.items()}
            for name, update in self._wholes.apply(orthogonal, parts).items():
                self._move(params[name], update, group, self._wholes.shape(name))

    def _direction(self, each: Tensor, group: dict[str, Any]) -> Tensor:
        """Nesterov's: the gradient, drawn to its average as that will be."""
        average = self.state[each]["momentum_buffer"].lerp(each.grad, 1 - group["momentum"])
        assert each.grad is not None, "a step follows the gradients"
        return each.grad.lerp(average, group["momentum"])

    def _move(
        self, each: Tensor, update: Tensor, group: dict[str, Any], whole: Sequence[int]
    ) -> None:
        rate = group["lr"]
        self.state[each]["momentum_buffer"].lerp_(each.grad, 1 - group["momentum"])
        scale = math.sqrt(max(1.0, whole[0] / whole[1]))
        each.mul_(1 - rate * group["weight_decay"]).add_(update, alpha=-rate * scale)
