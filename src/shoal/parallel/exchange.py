"""Exchanges between the ranks inside a replica, with their gradients.

Along tensor and context hidden states move along the sequence, along expert rows go to the experts'
ranks.

Two layouts of hidden states: whole on every rank, or split, rank r having tokens r x T/t to
(r + 1) x T/t. Each exchange is the transpose of its gradient's (Korthikanti et al., arXiv
2205.05198, section 4.2).

Shapes: B rows, T tokens (a multiple of t), t ranks, D hidden size.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.comm.group import Traffic
from shoal.runtime import complete

# torch 2.13 renames both and warns of the old names; earlier ones have no other
_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather_into(whole: Tensor, part: Tensor, *, group: dist.ProcessGroup | None = None) -> None:
    """Every rank's `part` [R, ...], one behind the other along the first dimension [N R, ...]."""
    complete(_all_gather_into, whole, part, group=group)


@dataclass
class Exchange:
    """One group of ranks that split the sequence or the experts; counts what it sends."""

    group: dist.ProcessGroup
    rank: int
    size: int
    traffic: Traffic = field(default_factory=Traffic)

    def gather(self, part: Tensor) -> Tensor:
        """[B, T/t, D] -> [B, T, D]. Gradient: partial sums of all ranks, summed and split."""
        return _apply(part, self, _gathered, _scattered)

    def scatter(self, partial: Tensor) -> Tensor:
        """A partial sum [B, T, D] -> the sum's own part [B, T/t, D]. Gradient: gathered."""
        return _apply(partial, self, _scattered, _gathered)

    def sum(self, partial: Tensor) -> Tensor:
        """A partial sum -> the sum, on every rank. Gradient: as it is (it is whole and equal)."""
        return _apply(partial, self, _summed, lambda each, _: each)

    def split(self, whole: Tensor) -> Tensor:
        """[B, T, D], equal on all ranks -> own part [B, T/t, D]. Gradient: gathered."""
        return _apply(whole, self, _own, _gathered)

    def join(self, part: Tensor) -> Tensor:
        """[B, T/t, D] -> [B, T, D], of which every rank computes the same. Gradient: own part."""
        return _apply(part, self, _gathered, _own)

    def swap(self, part: Tensor, *, split: int, join: int) -> Tensor:
        """Dim `split`, of which this rank has all, for dim `join`, of which it has a part.

        Rank r gets part r of every rank's `split`, one behind the other along `join`: heads for
        tokens in DeepSpeed-Ulysses (arXiv 2309.14509). Gradient: swapped back.
        """
        there, back = (partial(_swapped, dims=dims) for dims in ((split, join), (join, split)))
        return _apply(part, self, there, back)

    def send_rows(self, rows: Tensor, *, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Rows [sum(sent), D], those for rank 0 first -> [sum(received), D], those of rank 0 first.

        `sent[r]`: rows for rank r; `received[r]`: those it has for this one. Gradient: sent back.
        """
        there = partial(_rows_sent, sent=sent, received=received)
        return _apply(rows, self, there, partial(_rows_sent, sent=received, received=sent))

    def transpose(self, counts: Tensor) -> Tensor:
        """Integers for each rank [t, N] -> those that each rank has for this one [t, N]."""
        found = torch.empty_like(counts)
        with self.sending("all_to_all", (self.size - 1) * counts[0].nbytes):
            complete(dist.all_to_all_single, found, counts.contiguous(), group=self.group)
        return found

    @torch.no_grad()
    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each by its sum over the ranks, as one message."""
        flat = torch.cat([each.reshape(-1) for each in tensors])
        _sum_into(flat, self)
        for each, total in zip(tensors, flat.split([each.numel() for each in tensors])):
            each.copy_(total.view(each.shape))

    @contextlib.contextmanager
    def sending(self, operation: str, num_bytes: int) -> Iterator[None]:
        """Count `num_bytes` that this rank sends, and the time that it waits for them here."""
        began = time.perf_counter()
        yield
        self.traffic.count(operation, num_bytes, began=began)


_Move = Callable[[Tensor, Exchange], Tensor]


def _apply(tensor: Tensor, exchange: Exchange, forward: _Move, backward: _Move) -> Tensor:
    moved: Tensor = _eager(tensor, exchange, forward, backward)
    return moved


@torch.compiler.disable  # what is sent is counted: compiled code would count its tracing, once
def _eager(*arguments: Any) -> Any:
    return _Moved.apply(*arguments)  # type: ignore[no-untyped-call]


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, exchange: Exchange, forward: _Move, backward: _Move
    ) -> Tensor:
        ctx.exchange, ctx.move = exchange, backward
        return forward(tensor, exchange)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        moved: Tensor = ctx.move(gradient, ctx.exchange)
        return moved, None, None, None


def _gathered(part: Tensor, exchange: Exchange) -> Tensor:
    parts = part.new_empty(exchange.size, *part.shape)
    with exchange.sending("all_gather", (exchange.size - 1) * part.nbytes):
        all_gather_into(parts.flatten(0, 1), part.contiguous(), group=exchange.group)
    # [t, B, T/t, D] -> [B, t, T/t, D] -> [B, T, D]; of one token each that would be a view
    return parts.transpose(0, 1).flatten(1, 2).contiguous()


def _scattered(partial: Tensor, exchange: Exchange) -> Tensor:
    parts = partial.unflatten(1, (exchange.size, -1)).transpose(0, 1).contiguous()
    own: Tensor = parts.new_empty(parts.shape[1:])
    with exchange.sending("reduce_scatter", (exchange.size - 1) * own.nbytes):
        complete(_reduce_scatter_into, own, parts.flatten(0, 1), group=exchange.group)
    return own


def _summed(partial: Tensor, exchange: Exchange) -> Tensor:
    total = partial.clone(memory_format=torch.contiguous_format)
    _sum_into(total, exchange)
    return total


def _sum_into(total: Tensor, exchange: Exchange) -> None:
    with exchange.sending("all_reduce", 2 * (exchange.size - 1) * total.nbytes // exchange.size):
        complete(dist.all_reduce, total, group=exchange.group)


def _rows_sent(
    rows: Tensor, exchange: Exchange, *, sent: Sequence[int], received: Sequence[int]
) -> Tensor:
    landed = rows.new_empty(sum(received), *rows.shape[1:])
    away = rows.shape[0] - sent[exchange.rank]
    with exchange.sending("all_to_all", away * rows[:1].numel() * rows.element_size()):
        given = landed, rows.contiguous(), list(received), list(sent)
        complete(dist.all_to_all_single, *given, group=exchange.group)
    return landed


def _own(whole: Tensor, exchange: Exchange) -> Tensor:
    length = whole.shape[1] // exchange.size
    return whole.narrow(1, exchange.rank * length, length).contiguous()


def _swapped(part: Tensor, exchange: Exchange, dims: tuple[int, int]) -> Tensor:
    split, join = dims
    own = part.unflatten(split, (exchange.size, -1)).movedim(split, 0).contiguous()
    parts = torch.empty_like(own)
    with exchange.sending("all_to_all", own.nbytes // exchange.size * (exchange.size - 1)):
        given = parts.flatten(0, 1), own.flatten(0, 1)
        complete(dist.all_to_all_single, *given, group=exchange.group)
    return parts.movedim(0, join).flatten(join, join + 1).contiguous()
