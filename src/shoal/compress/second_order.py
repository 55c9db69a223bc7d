"""Rounding and pruning that make up for their error with the weights that follow in a row.

A layer's error on its inputs x is (W - W') H (W - W')' with H = sum x x'. Columns are settled one
after the other; what a column loses is spread over those to come by the inverse of H (Frantar et
al.: GPTQ, arXiv 2210.17323, algorithm 1; SparseGPT, arXiv 2301.00774, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shoal.compress.masks import Sparsity
from shoal.models.grid import Coded, Grid

_DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it."""
_COLUMNS = 128
"""Settled before what follows is updated at once."""

_Settle = Callable[[Tensor, int], Tensor]
"""What becomes of a column [O], the one of this number; its present values are given."""


def gptq(weight: Tensor, hessian: Tensor, grid: Grid) -> Coded:
    """weight float [O, I], hessian float64 [I, I] -> the weight on the grid.

    Inputs with the largest sums of squares are settled first, while most columns are left to make
    up for them; so scales are those of the weights as they came, whatever group a column is of.
    What is zero stays so.
    """
    outputs, inputs = weight.shape
    groups = grid.groups(inputs)
    scales = grid.scales(weight.reshape(outputs * groups, -1)).view(outputs, groups)
    codes = torch.empty(outputs, inputs, dtype=torch.int8)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    places, gone = order.tolist(), weight == 0

    def settle(column: Tensor, number: int) -> Tensor:
        place = places[number]
        group = place // (inputs // groups)
        scale = scales[:, group : group + 1].double()
        found = grid.codes(column[:, None], scale).masked_fill_(gone[:, place, None], 0.0)
        codes[:, place] = found[:, 0].to(torch.int8)
        return (found * scale)[:, 0]

    _sweep(weight.double()[:, order], hessian[order][:, order], settle, columns=_COLUMNS)
    return Coded(codes, scales, grid)


def sparse_gpt(weight: Tensor, hessian: Tensor, sparsity: Sparsity) -> Tensor:
    """weight float [O, I], hessian float64 [I, I] -> the weight with zeros, the rest adapted."""
    work = weight.double().clone()
    step = sparsity.width or _COLUMNS
    kept = torch.ones_like(work, dtype=torch.bool)

    def choose(start: int, stop: int, inverse: Tensor) -> None:
        losses = (work[:, start:stop] / inverse.diagonal()[start:stop]).square()
        kept[:, start:stop] = sparsity.kept(losses, together=True)

    def settle(column: Tensor, number: int) -> Tensor:
        return column * kept[:, number]

    _sweep(work, hessian, settle, columns=step, begin=choose)
    return work.to(weight.dtype)


def _sweep(
    work: Tensor,
    hessian: Tensor,
    settle: _Settle,
    *,
    columns: int,
    begin: Callable[[int, int, Tensor], None] = lambda start, stop, inverse: None,
) -> None:
    """Settle the columns of `work` float64 [O, I] in place, `columns` between two updates."""
    inverse = _upper_inverse(hessian)
    inputs = work.shape[1]
    for start in range(0, inputs, columns):
        stop = min(start + columns, inputs)
        begin(start, stop, inverse)
        errors = torch.empty(work.shape[0], stop - start, dtype=work.dtype)
        for number in range(start, stop):
            column = work[:, number]
            found = settle(column, number)
            error = (column - found) / inverse[number, number]
            errors[:, number - start] = error
            work[:, number + 1 : stop] -= torch.outer(error, inverse[number, number + 1 : stop])
            work[:, number] = found
        work[:, stop:] -= errors @ inverse[start:stop, stop:]


def _upper_inverse(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped matrix [I, I].

    Inputs that were never seen get a diagonal of their own, so that their weights stay as they are.
    """
    matrix = hessian.double().clone()
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += _DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    return torch.linalg.cholesky(inverse, upper=True)
