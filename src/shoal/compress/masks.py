"""Which weights stay: a share of each row, or some of every few neighbours (2:4)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.errors import UserError


@dataclass(frozen=True)
class Sparsity:
    """`share` of the weights go; with `width`, `share` x width of every `width` neighbours."""

    share: float
    width: int = 0

    @classmethod
    def parse(cls, text: str) -> Sparsity:
        """`0.5`, or `2:4` (two of every four go). Raises UserError."""
        pattern = re.fullmatch(r"(\d+):(\d+)", text)
        if pattern is not None:
            gone, width = int(pattern[1]), int(pattern[2])
            if 0 < gone < width:
                return cls(gone / width, width)
        try:
            share = float(text)
        except ValueError:
            share = 0.0
        if 0.0 < share < 1.0:
            return cls(share)
        raise UserError(
            f"--prune: expected a share between 0 and 1 such as 0.5, or a pattern such as 2:4, "
            f"got {text!r}"
        )

    def kept(self, worth: Tensor, *, together: bool = False) -> Tensor:
        """Which of [O, n] stay, those of most worth: of each row, or of all rows `together`.

        Of equals the later one stays. Raises UserError where a pattern does not divide n.
        """
        rows, count = worth.shape
        if self.width:
            if count % self.width:
                raise UserError(
                    f"--prune: a layer has {count} inputs, which {self.width} does not divide"
                )
            parts = worth.reshape(-1, self.width)
        else:
            parts = worth.reshape(1, -1) if together else worth
        gone = round(self.share * parts.shape[1])
        order = parts.argsort(dim=1, stable=True)
        kept = torch.ones_like(parts, dtype=torch.bool)
        kept.scatter_(1, order[:, :gone], False)
        return kept.view(rows, count)


def wanda(weight: Tensor, squares: Tensor, sparsity: Sparsity) -> Tensor:
    """weight [O, I] and the sum of squares of each input [I] -> the weight with zeros.

    A weight is worth its size times its input's norm (Sun et al., arXiv 2306.11695, equation 1).
    """
    worth = weight.abs() * squares.sqrt().to(weight.dtype)
    return weight * sparsity.kept(worth)
