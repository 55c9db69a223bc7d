"""Ring attention: keys and values go round the ranks, each of which keeps its queries.

Exact, by the online softmax: a rank adds up what the part of the keys that it has gives its
queries, with the largest score and the sum of exponentials so far, and passes that part on (Liu et
al., arXiv 2310.01889; the statistics as in Milakov and Gimelshein, arXiv 1805.02867). The backward
computes the scores again from the saved log of the sum (Dao et al., arXiv 2205.14135), and the
gradients of keys and values travel behind them until they are home. The next part is on its way
while this one is computed.

Shapes: B rows, H heads, K key heads, G = H / K, T tokens of this rank, Q queries and S keys of a
block, D head size, V size of values.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.parallel.exchange import Exchange

_BLOCK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""Budget for the scores of one block, in float32: on a CPU what stays in its cache."""


@dataclass(frozen=True)
class Seen:
    """Which keys a token sees, beside none that follow it: of whole rows, the same for all heads.

    `documents` int [B, row]; `first`, `last`: of each position, where the document that it is in
    begins, in the row in which that is earliest, and latest.
    """

    window: int | None = None
    documents: Tensor | None = None
    first: Sequence[int] = ()
    last: Sequence[int] = ()

    @classmethod
    def of(cls, *, window: int | None, documents: Tensor | None) -> Seen:
        """`documents` of whole rows, each a run of one number; None: every row is one."""
        if documents is None:
            return cls(window)
        starts = torch.zeros_like(documents, dtype=torch.int64)
        places = torch.arange(documents.shape[1], device=documents.device)
        starts[:, 1:] = (documents[:, 1:] != documents[:, :-1]) * places[1:]
        found = starts.cummax(dim=1).values
        return cls(window, documents, found.amin(0).tolist(), found.amax(0).tolist())

    def keys(self, queries: range, keys: range) -> range:
        """Those of `keys` that any of `queries` may see; positions in the row."""
        start, stop = keys.start, min(keys.stop, queries.stop)
        if self.window is not None:
            start = max(start, queries.start - self.window + 1)
        if self.documents is not None:
            start = max(start, self.first[queries.start])
        return range(start, max(start, stop))

    def hidden(self, queries: range, keys: range, *, device: torch.device) -> Tensor | None:
        """bool [B or 1, 1, Q, S], True where a query may not look; None: nowhere."""
        rows, columns = (torch.arange(e.start, e.stop, device=device) for e in (queries, keys))
        behind = rows[:, None] - columns
        hidden = None
        if keys.stop - 1 > queries.start:
            hidden = (behind < 0)[None, None]
        if self.window is not None and queries.stop - 1 - keys.start >= self.window:
            far = (behind >= self.window)[None, None]
            hidden = far if hidden is None else hidden | far
        if self.documents is not None and self.last[queries.stop - 1] > keys.start:
            ours, theirs = (self.documents[:, e.start : e.stop] for e in (queries, keys))
            other = (ours[:, :, None] != theirs[:, None, :])[:, None]
            hidden = other if hidden is None else hidden | other
        return hidden


@dataclass(frozen=True)
class Ring:
    """The ranks in their order, and the slices of a row that each has: `slices[rank]`."""

    exchange: Exchange
    slices: Sequence[Sequence[range]]

    def source(self, hop: int) -> int:
        """Whose keys are here after `hop` hops."""
        return (self.exchange.rank - hop) % self.exchange.size

    def pass_on(self, tensors: Sequence[Tensor], *, tag: int) -> _Passing:
        """Begin to send `tensors` to the next rank, and to receive those of the one before."""
        size, rank, group = self.exchange.size, self.exchange.rank, self.exchange.group
        after, before = (dist.get_global_rank(group, (rank + by) % size) for by in (1, -1))
        device = tensors[0].device
        if device.type != "cpu" and dist.get_backend(group) == "gloo":  # ranks that share a GPU
            tensors = [each.cpu() for each in tensors]
        arriving = [torch.empty_like(each) for each in tensors]
        moves = []
        for number, (ours, theirs) in enumerate(zip(tensors, arriving)):
            moves.append(dist.P2POp(dist.isend, ours, after, group, tag + number))
            moves.append(dist.P2POp(dist.irecv, theirs, before, group, tag + number))
        began = time.perf_counter()
        works = dist.batch_isend_irecv(moves)
        return _Passing(self.exchange, tensors, arriving, works, device, began)

    def blocks(self, hop: int, seen: Seen, *, bytes_per_score: int, device: torch.device) -> Any:
        """(queries, keys, hidden) of each block of this hop: slices of what is here.

        A query's own position is in the first of its blocks, so that none of its sums is empty.
        """
        budget = _BLOCK_BYTES.get(device.type, _BLOCK_BYTES["cuda"]) // bytes_per_score
        theirs = self.slices[self.source(hop)]
        for own, own_at in _placed(self.slices[self.exchange.rank]):
            most = max(16, budget // len(own))
            for start in range(own.start, own.stop, most):
                queries = range(start, min(start + most, own.stop))
                for part, part_at in reversed(list(_placed(theirs))):
                    keys = seen.keys(queries, part)
                    if keys:
                        hidden = seen.hidden(queries, keys, device=device)
                        yield (
                            _local(queries, own, own_at),
                            _local(keys, part, part_at),
                            hidden,
                        )


def _placed(slices: Sequence[range]) -> Iterator[tuple[range, int]]:
    """Each slice of a row, and where it lies on the rank that has it."""
    yield from zip(slices, accumulate((len(each) for each in slices), initial=0))


def _local(part: range, whole: range, at: int) -> slice:
    return slice(part.start - whole.start + at, part.stop - whole.start + at)


@dataclass(frozen=True)
class _Passing:
    """Tensors on their way round."""

    exchange: Exchange
    sent: Sequence[Tensor]
    arriving: list[Tensor]
    works: Sequence[Any]
    device: torch.device
    began: float

    def wait(self) -> list[Tensor]:
        """What has arrived; the time spent counts as communication."""
        waited = time.perf_counter()
        for work in self.works:
            work.wait()
        num_bytes = sum(each.nbytes for each in self.sent)
        self.exchange.traffic.count("ring", num_bytes, began=self.began, waited=waited)
        return [each.to(self.device) for each in self.arriving]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    ring: Ring,
    seen: Seen,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """query [B, H, T, D], key [B, K, T, D], value [B, K, T, V] of this rank -> [B, T, H, V].

    Causal. Statistics and sums in float32, or float64 for such inputs. Differentiable once.
    """
    how = _How(ring, seen, scale, softcap)
    result: Tensor = _Attention.apply(query, key, value, how)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class _How:
    """Everything of one attention that is no tensor."""

    ring: Ring
    seen: Seen
    scale: float
    softcap: float | None

    def blocks(self, hop: int, query: Tensor) -> Any:
        """The blocks of a hop, for queries [B, H, T, D]."""
        bytes_per_score = 4 * query.shape[0] * query.shape[1]
        return self.ring.blocks(
            hop, self.seen, bytes_per_score=bytes_per_score, device=query.device
        )

    def scores(self, queries: Tensor, keys: Tensor, hidden: Tensor | None, rows: int) -> Tensor:
        """[B x K, G x Q, D] and [B x K, S, D] -> [B x K, G x Q, S], wide; -inf where hidden."""
        scores = _product(queries, keys.transpose(1, 2), self.scale).to(_wide(queries.dtype))
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        return _hide(scores, hidden, rows)

    def weights(
        self, queries: Tensor, keys: Tensor, logs: Tensor, hidden: Tensor | None, rows: int
    ) -> tuple[Tensor, Tensor | None]:
        """Probabilities as `scores`, of known logs of their sums; and the slope of the squashing,
        if any."""
        if self.softcap is None:
            scores = _less(queries, keys.transpose(1, 2), logs, self.scale)
            return _hide(scores, hidden, rows).exp_(), None
        scores = self.scores(queries, keys, hidden, rows)
        slope = 1 - (scores / self.softcap).clamp(-1.0, 1.0).square()
        return scores.sub_(logs).exp_(), slope


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, how: _How) -> Tensor:
        rows, heads, length, _ = query.shape
        grouped, passing = _grouped(query, key.shape[1]), [key.contiguous(), value.contiguous()]
        wide, hops = _wide(query.dtype), how.ring.exchange.size
        output = grouped.new_zeros(*grouped.shape[:3], value.shape[3], dtype=wide)
        top = grouped.new_full((*grouped.shape[:3], 1), -torch.inf, dtype=wide)
        total = torch.zeros_like(top)
        with torch.autocast(query.device.type, enabled=False):
            for hop in range(hops):
                moving = how.ring.pass_on(passing, tag=0) if hop < hops - 1 else None
                keys, values = (each.flatten(0, 1) for each in passing)
                for here, there, hidden in how.blocks(hop, query):
                    queries = grouped[:, :, here].flatten(1, 2)
                    scores = how.scores(queries, keys[:, there], hidden, rows)
                    scores = scores.unflatten(1, (grouped.shape[1], -1))
                    before = top[:, :, here]
                    highest = torch.maximum(before, scores.amax(-1, keepdim=True))
                    weights = scores.sub_(highest).exp_()
                    kept = before.sub_(highest).exp_()
                    total[:, :, here].mul_(kept).add_(weights.sum(-1, keepdim=True))
                    found = _product(weights.flatten(1, 2).to(value.dtype), values[:, there])
                    output[:, :, here].mul_(kept).add_(found.view_as(output[:, :, here]))
                    top[:, :, here] = highest
                passing = moving.wait() if moving else passing
        output /= total
        result = output.to(query.dtype).view(rows, heads, length, -1).transpose(1, 2).contiguous()
        ctx.save_for_backward(query, key, value, result, top + total.log())
        ctx.how = how
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, result, logs = ctx.saved_tensors
        how: _How = ctx.how
        rows, groups = query.shape[0], key.shape[1]
        grouped, pulled = (_grouped(e, groups) for e in (query, gradient.transpose(1, 2)))
        means = _grouped((gradient * result).transpose(1, 2), groups).to(logs.dtype)
        means = means.sum(-1, keepdim=True)
        found = grouped.new_zeros(grouped.shape, dtype=logs.dtype)
        passing = [key.contiguous(), value.contiguous()]
        hops, behind = how.ring.exchange.size, None
        with torch.autocast(query.device.type, enabled=False):
            for hop in range(hops):
                moving = how.ring.pass_on(passing, tag=0) if hop < hops - 1 else None
                keys, values = (each.flatten(0, 1) for each in passing)
                added = [torch.zeros_like(e, dtype=logs.dtype) for e in (keys, values)]
                for here, there, hidden in how.blocks(hop, query):
                    queries, pulls, log, mean = (
                        each[:, :, here].flatten(1, 2) for each in (grouped, pulled, logs, means)
                    )
                    weights, squashed = how.weights(queries, keys[:, there], log, hidden, rows)
                    _add_product(added[1][:, there], weights.transpose(1, 2), pulls)
                    slopes = _less(pulls, values[:, there].transpose(1, 2), mean).mul_(weights)
                    slopes = slopes if squashed is None else slopes.mul_(squashed)
                    toward = _product(slopes.to(queries.dtype), keys[:, there], how.scale)
                    found[:, :, here] += toward.view_as(found[:, :, here])
                    _add_product(added[0][:, there], slopes.transpose(1, 2), queries, how.scale)
                if behind is not None:  # what the ranks before gave these keys and values
                    added = [ours.add_(theirs) for ours, theirs in zip(added, behind.wait())]
                behind = how.ring.pass_on(added, tag=2)
                passing = moving.wait() if moving else passing
        assert behind is not None, "there is at least one hop"
        home = behind.wait()
        return (
            found.view_as(query).to(query.dtype),
            home[0].view_as(key).to(key.dtype),
            home[1].view_as(value).to(value.dtype),
            None,
        )


def _hide(scores: Tensor, hidden: Tensor | None, rows: int) -> Tensor:
    """Scores [B x K, G x Q, S] of `rows` B, set to -inf where hidden, in place."""
    if hidden is not None:
        shown = scores.view(rows, -1, *hidden.shape[-2:])
        shown.masked_fill_(hidden, -torch.inf)
    return scores


def _grouped(by_head: Tensor, groups: int) -> Tensor:
    """[B, H, T, D] -> [B x K, G, T, D]."""
    rows, heads, length, size = by_head.shape
    return by_head.reshape(rows * groups, heads // groups, length, size)


def _product(first: Tensor, second: Tensor, scale: float = 1.0) -> Tensor:
    """Batched matrix product times `scale`. Not bmm, which selective recompute would keep."""
    return torch.baddbmm(first.new_empty(1, 1, 1), first, second, beta=0.0, alpha=scale)


def _less(first: Tensor, second: Tensor, minus: Tensor, scale: float = 1.0) -> Tensor:
    """The product less `minus`, in its type: in one pass where that is the factors'."""
    if first.dtype == minus.dtype:
        return torch.baddbmm(minus, first, second, beta=-1.0, alpha=scale)
    return _product(first, second, scale).to(minus.dtype).sub_(minus)


def _add_product(into: Tensor, first: Tensor, second: Tensor, scale: float = 1.0) -> None:
    """Add the product of factors in the second's type."""
    first = first.to(second.dtype)
    if into.dtype == second.dtype:
        into.baddbmm_(first, second, alpha=scale)
    else:
        into += _product(first, second, scale)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
