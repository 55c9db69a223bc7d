"""Codec powersgd: of each matrix a product of two thin ones crosses.

Vogels et al., "PowerSGD: practical low-rank gradient compression for distributed optimization"
(arXiv 1905.13727): P = M Q, summed and made orthogonal; Q = M' P, summed; the result is P Q'. Q
goes into the next round (warm start). What is no matrix, or would not get smaller, crosses whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from shoal.comm.codec.codec import Codec, generator, mixed
from shoal.comm.flat import FlatLayout, Vector
from shoal.comm.group import Group


@dataclass(frozen=True)
class _Matrix:
    """A tensor of the vector as rows x columns, at `start`."""

    start: int
    rows: int
    columns: int

    def of(self, flat: Tensor) -> Tensor:
        """Its view in `flat`."""
        return flat[self.start : self.start + self.rows * self.columns].view(self.rows, -1)


class PowerSGD(Codec):
    """Rank `rank` of what this rank has of each parameter in `layout`, whole or a part.

    `numel`: elements that are summed, the first of the layout. Q lies in a vector laid out as the
    parameters, in the place of its matrix, so that checkpoints and repairs know it; it is the same
    on all replicas. In another layout it begins anew where it makes no sense there.
    """

    def __init__(self, layout: FlatLayout, *, rank: int, numel: int, device: torch.device) -> None:
        self.rank = rank
        self._matrices, plain = list[_Matrix](), list[tuple[int, int]]()
        for name, shape in layout.shapes.items():
            start, count = layout.offsets[name], prod(shape)
            if not count or start >= numel:
                continue
            rows = shape[0] if shape else 1
            matrix = _Matrix(start, rows, count // rows)
            small = rank * (matrix.rows + matrix.columns) < count and rank <= matrix.rows
            if len(shape) > 1 and small:
                self._matrices.append(matrix)
            else:
                plain.append((start, start + count))
        self._plain = plain
        self._kept = torch.zeros(numel, dtype=torch.float32, device=device)
        self._next: list[Tensor] | None = None
        regions = frozenset(layout.regions) - {"frozen"}
        self._vector = Vector("powersgd/q", self._kept, regions, steady=True, optional=True)

    @property
    def num_values(self) -> int:
        """Values that are summed in a round, of P, of Q, and of what crosses whole."""
        thin = sum(self.rank * (each.rows + each.columns) for each in self._matrices)
        return thin + sum(stop - start for start, stop in self._plain)

    def sum_(self, group: Group, values: Tensor, *, key: int) -> Tensor:
        flat, sent = values.float(), values.clone()
        matrices = [each.of(flat) for each in self._matrices]
        thin = self._summed(group, [m @ q for m, q in zip(matrices, self._warm(key))])
        finite = all(bool(torch.isfinite(p).all()) for p in thin)
        bases = [torch.linalg.qr(p).Q if finite else torch.full_like(p, torch.nan) for p in thin]
        own = [m.T @ p for m, p in zip(matrices, bases)]
        plain = [flat[start:stop] for start, stop in self._plain]
        totals = self._summed(group, [*own, *plain])
        following = totals[: len(own)]
        for each, p, q, mine in zip(self._matrices, bases, following, own):
            torch.mm(p, q.T, out=each.of(flat))
            each.of(sent).copy_(p @ mine.T)
        for (start, stop), total in zip(self._plain, totals[len(own) :]):
            flat[start:stop] = total
        values.copy_(flat)
        self._next = following if finite else None
        return sent

    def commit(self) -> None:
        for matrix, q in zip(self._matrices, self._next or ()):
            self._of(matrix).copy_(q)
        self._next = None

    def vectors(self) -> Iterable[Vector]:
        return (self._vector,)

    def _of(self, matrix: _Matrix) -> Tensor:
        """Where the Q of a matrix is kept: [columns, rank]."""
        count = matrix.columns * self.rank
        return self._kept[matrix.start : matrix.start + count].view(-1, self.rank)

    def _warm(self, key: int) -> list[Tensor]:
        """Each matrix's Q to begin with; drawn where there is none."""
        found = []
        for matrix in self._matrices:
            q = self._of(matrix)
            norms = torch.linalg.vector_norm(q, dim=0)
            if not bool((torch.isfinite(norms) & (norms > 0)).all()):
                draws = generator(q.device, mixed(key, matrix.start))
                q = torch.randn(q.shape, generator=draws, device=q.device)
            found.append(q)
        return found

    @staticmethod
    def _summed(group: Group, parts: list[Tensor]) -> list[Tensor]:
        """The sums of `parts` over ranks, in one message."""
        if not parts:
            return []
        flat = torch.cat([part.reshape(-1) for part in parts])
        group.sum_(flat)
        found = flat.split([part.numel() for part in parts])
        return [each.view(part.shape) for each, part in zip(found, parts)]
