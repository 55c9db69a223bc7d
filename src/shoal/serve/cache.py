"""The cache of keys and values in blocks, and attention over it: the kernel of serving.

Every product has one inner length (the head size, or the tokens of a block), blocks are summed in
one fixed tree, and what lies behind a sequence's end adds exact zeros: so a token's bits depend
neither on how many are computed at once nor on how a prompt was cut into chunks.

Shapes: E entries of N tokens, B blocks, P pairs of an entry and a block, S tokens of a block, K key
heads, G = heads of each, R rows (G x N), D head size of keys, V of values, T tokens of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as functional
from torch import Tensor

from shoal.errors import ModelError
from shoal.models.kernels import MaskRequest

SINK = 0
"""The block that padding is written to and read from."""
_ALONE = 8
"""Tokens of a sequence up to which it is attended in one call with others that have as many."""
_SMALL = 128
"""Tokens times blocks of a sequence up to which the same is done with more tokens."""
_LEAST = (1, 2, 4, 8, 16)
_LEAST_RUN = 3
"""Neighbouring blocks that are worth a product of their own; fewer are copied."""
_LEAST_SCORE = -80.0
"""Under the highest; what is lower counts as this, 2e-35 of it: numbers of that kind, and the
infinite, take many times as long."""


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence in a step: where they stand in it, and where their blocks are."""

    start: int
    """Position of the first."""
    count: int
    blocks: tuple[int, ...]
    """Of the whole sequence so far, this step's tokens too."""


@dataclass(frozen=True)
class Pairs:
    """(entry, block) pairs in an order in which blocks that are neighbours are read in place."""

    owners: Tensor
    """int64 [P]: the entry of each pair."""
    first_keys: Tensor
    """int64 [P]: the position of the block's first key."""
    table: Tensor
    """int64 [E x B]: the pair of each block of an entry; P, which adds zeros, where it has none."""
    seen: Tensor
    """int64 [E x B]: the same, but the entry's first pair where it has no block."""
    full: bool
    """Whether every entry has B blocks."""
    runs: tuple[tuple[int, int], ...]
    """(first block, blocks) of the runs of neighbours; their pairs come first."""
    loose: Tensor
    """int64 [L]: blocks of the other pairs, which are copied."""

    @classmethod
    def of(cls, tables: Sequence[Sequence[int]], *, block_tokens: int, first: int = 0) -> Pairs:
        """Pairs of entries with these blocks; those before the `first` are seen by nobody."""
        known = sorted(
            (block, entry, number)
            for entry, blocks in enumerate(tables)
            for number, block in enumerate(blocks)
            if number >= first
        )
        runs: list[list[tuple[int, int, int]]] = []
        for each in known:
            if runs and each[0] == runs[-1][-1][0] + 1:
                runs[-1].append(each)
            else:
                runs.append([each])
        long = [run for run in runs if len(run) >= _LEAST_RUN]
        short = [each for run in runs if len(run) < _LEAST_RUN for each in run]
        order = [each for run in long for each in run] + short
        table = torch.full((len(tables), max(len(blocks) for blocks in tables)), len(order))
        placed = torch.tensor([[entry, number] for _, entry, number in order])
        table[placed[:, 0], placed[:, 1]] = torch.arange(len(order))
        missing = table == len(order)
        return cls(
            placed[:, 0].contiguous(),
            placed[:, 1] * block_tokens,
            table.flatten(),
            torch.where(missing, table.amin(1, keepdim=True), table).flatten(),
            not first and all(len(blocks) == table.shape[1] for blocks in tables),
            tuple((run[0][0], len(run)) for run in long),
            torch.tensor([block for block, _, _ in short], dtype=torch.long),
        )

    def products(self, rows: Tensor, blocks: Tensor) -> Tensor:
        """rows [P, K, R, A] of pairs times their blocks' [blocks, K, A, C] -> [P, K, R, C]."""
        found, at = [], 0
        for first, count in self.runs:
            own = blocks[first : first + count]
            found.append(torch.bmm(rows[at : at + count].flatten(0, 1), own.flatten(0, 1)))
            at += count
        if at < len(rows):
            own = blocks.index_select(0, self.loose)
            found.append(torch.bmm(rows[at:].flatten(0, 1), own.flatten(0, 1)))
        made = found[0] if len(found) == 1 else torch.cat(found)
        return made.view(*rows.shape[:3], -1)


@dataclass(frozen=True)
class Look:
    """What rows of a layer see: computed once in a step."""

    pairs: Pairs
    sources: Tensor
    """int64 [P x K x R]: the query of each row, of all [T x K x G]."""
    rows: int
    """R, padding too."""
    hides: Tensor
    """[P, 1, R, S]: -inf where a row may not look, else 0."""
    keeps: Tensor
    """[P, 1, R, S]: 0 there, else 1."""


@dataclass
class Entries:
    """Entries of as many tokens each that are attended in one call."""

    columns: Tensor
    """int64 [E x N]: of the step."""
    positions: Tensor
    """int64 [E, N]."""
    tables: Sequence[Sequence[int]]
    """Blocks of each entry."""
    block_tokens: int
    _pairs: dict[int, Pairs] = field(default_factory=dict)
    _looks: dict[tuple[int | None, int, int], Look] = field(default_factory=dict)

    def _pairs_through(self, window: int | None) -> Pairs:
        """The blocks that are seen through a `window`."""
        least = 0 if window is None else int(self.positions.min()) + 1 - window
        first = max(0, least) // self.block_tokens
        if first not in self._pairs:
            made = Pairs.of(self.tables, block_tokens=self.block_tokens, first=first)
            self._pairs[first] = made
        return self._pairs[first]

    def look(self, window: int | None, *, heads: int, share: int, least: int) -> Look:
        """How rows of a layer of K `heads`, G = `share`, meet blocks. Once in a step, for all."""
        key = (window, heads, share)
        if key not in self._looks:
            pairs = self._pairs_through(window)
            # a row is a token and one of a head's queries; padding repeats the first
            number = torch.arange(self.positions.shape[1] * share)
            number = functional.pad(number, (0, -len(number) % least))
            columns = self.columns.view(self.positions.shape)[:, number // share]  # [E, R]
            of_step = (columns[:, None] * heads + torch.arange(heads)[:, None]) * share
            sources = of_step + number % share  # [E, K, R]
            at = self.positions[:, number // share][pairs.owners][:, None, :, None]
            keys = pairs.first_keys[:, None] + torch.arange(self.block_tokens)
            ahead = keys[:, None, None, :] - at
            hidden = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
            zeros = torch.zeros(hidden.shape)
            self._looks[key] = Look(
                pairs,
                sources[pairs.owners].flatten(),
                len(number),
                zeros.masked_fill(hidden, -torch.inf),
                (~hidden).float(),
            )
        return self._looks[key]


@dataclass
class Cache:
    """Keys and values of all layers, in `num_blocks` blocks of `block_tokens`.

    Tensors are made when a layer first writes, as its shapes are known then.
    """

    num_blocks: int
    block_tokens: int = 64
    keys: dict[int, Tensor] = field(default_factory=dict)
    """Of a layer [blocks, K, D, S]."""
    values: dict[int, Tensor] = field(default_factory=dict)
    """Of a layer [blocks, K, S, V]."""

    def write(
        self, layer: int, key: Tensor, value: Tensor, *, blocks: Tensor, places: Tensor
    ) -> None:
        """Keep keys [T, K, D] and values [T, K, V] in `blocks` [T] at their `places` [T]."""
        if layer not in self.keys:
            heads, size = key.shape[1:]
            shape = (self.num_blocks, heads, size, self.block_tokens)
            self.keys[layer] = key.new_zeros(shape)
            self.values[layer] = value.new_zeros(
                (self.num_blocks, heads, self.block_tokens, value.shape[-1])
            )
        self.keys[layer][blocks, :, :, places] = key
        self.values[layer][blocks, :, places] = value


class Paged:
    """A step's kernel: writes its tokens to the cache and lets each see its own sequence."""

    by_layer: ClassVar[bool] = True

    def __init__(self, cache: Cache, spans: Sequence[Span], *, num_tokens: int, least: int) -> None:
        """`spans` follow one another in the step; what is left of `num_tokens` is padding.

        `least`: rows of an attention product are padded to a multiple of it (`least_rows`).
        """
        self._cache, self._least, self._num = cache, least, num_tokens
        size = cache.block_tokens
        slots: list[int] = []
        alike: dict[int, list[tuple[int, Span]]] = {}
        for span in spans:
            first = len(slots)
            places = range(span.start, span.start + span.count)
            slots += [span.blocks[at // size] * size + at % size for at in places]
            together = span.count <= _ALONE or span.count * len(span.blocks) <= _SMALL
            alike.setdefault(span.count if together else -first - 1, []).append((first, span))
        self._entries = [_entries(each, size) for each in alike.values()]
        at = torch.tensor(slots)
        self._blocks, self._places = at // size, at % size
        order = [at + n for each in alike.values() for at, span in each for n in range(span.count)]
        self._order = None if order == [*range(num_tokens)] else torch.tensor(order)

    def mask(self, request: MaskRequest) -> int | None:
        """The window of this kind of mask, in tokens; None: all that came before."""
        return request.window

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int,
        mask: Any,
        causal: bool,
        scale: float,
        softcap: float | None,
        bias: Tensor | None,
    ) -> Tensor:
        """See `Kernel`; one row [1, H, T, D] of all sequences' tokens. Raises ModelError."""
        if bias is not None or not causal or layer < 0:
            raise ModelError(
                "attention: only causal attention without added biases can be served\n"
                "    serve a decoder-only language model"
            )
        cache, count = self._cache, len(self._blocks)
        by_column = [each[0, :, :count].transpose(0, 1) for each in (key, value)]
        cache.write(layer, *by_column, blocks=self._blocks, places=self._places)
        groups = key.shape[1]
        by_token = query[0].transpose(0, 1).unflatten(1, (groups, -1))  # [T, K, G, D]
        found = [
            attend_pairs(
                by_token,
                entries=each,
                keys=cache.keys[layer],
                values=cache.values[layer],
                window=mask,
                scale=scale,
                softcap=softcap,
                least=self._least,
            )
            for each in self._entries
        ]
        if self._order is None:  # all of them, in order
            return (found[0] if len(found) == 1 else torch.cat(found))[None]
        output = query.new_zeros(self._num, query.shape[1], value.shape[-1])
        return output.index_copy_(0, self._order, torch.cat(found))[None]


def _entries(spans: Sequence[tuple[int, Span]], block_tokens: int) -> Entries:
    """Spans of as many tokens each, with their first columns, as what is attended in one call."""
    count = spans[0][1].count
    inside = torch.arange(count)
    columns = torch.tensor([first for first, _ in spans])[:, None] + inside
    positions = torch.tensor([span.start for _, span in spans])[:, None] + inside
    tables = [span.blocks[: (span.start + span.count - 1) // block_tokens + 1] for _, span in spans]
    return Entries(columns.flatten(), positions, tables, block_tokens)


def attend_pairs(
    query: Tensor,
    *,
    entries: Entries,
    keys: Tensor,
    values: Tensor,
    window: int | None,
    scale: float,
    softcap: float | None,
    least: int,
) -> Tensor:
    """query [T, K, G, D], keys [blocks, K, D, S], values [blocks, K, S, V] -> [E x N, K x G, V].

    Softmax over blocks with the exact maximum of all (Flash-decoding's sums, arXiv 2307.08691, in a
    fixed tree). Queries are brought to the blocks, which are read where they lie.
    """
    count, tokens = entries.positions.shape
    heads, share, size = query.shape[1:]
    look = entries.look(window, heads=heads, share=share, least=least)
    pairs, rows = look.pairs, look.rows
    brought = (query * scale).reshape(-1, size).index_select(0, look.sources)
    scores = pairs.products(brought.view(-1, heads, rows, size), keys)
    scores = scores.float() if scores.dtype == torch.bfloat16 else scores
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.add_(look.hides)
    highest = scores.detach().amax(-1).index_select(0, pairs.seen)
    highest = highest.view(count, -1, heads, rows).amax(1)
    below = scores.sub_(highest.index_select(0, pairs.owners)[..., None])
    weights = torch.exp(below.clamp_(min=_LEAST_SCORE, max=0.0)) * look.keeps
    total = weights.sum(dim=-1, keepdim=True)
    parts = pairs.products(weights.to(values.dtype), values)
    parts = torch.cat([parts.float() if parts.dtype == torch.bfloat16 else parts, total], dim=-1)
    if not pairs.full:
        parts = functional.pad(parts, (0, 0, 0, 0, 0, 0, 0, 1))
    summed = _tree(parts.index_select(0, pairs.table).view(count, -1, *parts.shape[1:]))
    summed = summed[:, :, : tokens * share]
    output = (summed[..., :-1] / summed[..., -1:]).to(query.dtype)
    if tokens > 1:
        output = output.view(count, heads, tokens, share, -1).transpose(1, 2)
    return output.reshape(count * tokens, heads * share, -1)


def _tree(parts: Tensor) -> Tensor:
    """The sum over dim 1 in one binary tree of neighbours: more zeros behind change no bit."""
    while parts.shape[1] > 1:
        if parts.shape[1] % 2:
            parts = torch.cat([parts, torch.zeros_like(parts[:, :1])], dim=1)
        parts = parts[:, 0::2] + parts[:, 1::2]
    return parts[:, 0] + 0.0  # a lone -0 becomes 0, as it does beside zeros


@torch.no_grad()
def least_rows(*, size: int, value_size: int, block_tokens: int, like: Tensor) -> tuple[int, bool]:
    """(multiple of rows, proven): the least one at which rows of attention keep their bits.

    On the device of `like` and in its format.
    """
    generator = torch.Generator().manual_seed(2)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(like)

    pairs = [
        (drawn(12, 192, size), drawn(12, size, block_tokens)),
        (drawn(12, 192, block_tokens), drawn(12, block_tokens, value_size)),
    ]
    for least in _LEAST:
        if all(_keeps(left, right, least) for left, right in pairs):
            return least, True
    return _LEAST[-1], False


def _keeps(left: Tensor, right: Tensor, least: int) -> bool:
    whole = torch.bmm(left, right)
    return all(
        torch.equal(torch.bmm(left[a:b, :rows].contiguous(), right[a:b]), whole[a:b, :rows])
        for rows in range(least, 193, least)
        if rows <= 8 * least or rows % 64 == 0
        for a, b in ((0, 12), (0, 1), (3, 8))
    )


class Rows:
    """The kernel of whole rows by the same sums: a training forward with serving's bits.

    Each row is one document from its first token on; padding may follow it.
    """

    by_layer: ClassVar[bool] = False

    def __init__(self, *, block_tokens: int = 64, least: int = 1) -> None:
        self._size, self._least = block_tokens, least

    def mask(self, request: MaskRequest) -> int | None:
        """As of `Paged`."""
        return request.window

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int,
        mask: Any,
        causal: bool,
        scale: float,
        softcap: float | None,
        bias: Tensor | None,
    ) -> Tensor:
        """See `Kernel`; differentiable."""
        if bias is not None or not causal:
            raise ModelError("attention: only causal attention without added biases is served")
        rows, groups, length, _ = key.shape
        missing = -length % self._size
        blocks = (length + missing) // self._size
        # [B x blocks, K, S, D], and the sink before them
        in_blocks = [
            functional.pad(
                functional.pad(each, (0, 0, 0, missing))
                .unflatten(2, (blocks, self._size))
                .transpose(1, 2)
                .flatten(0, 1),
                (0, 0, 0, 0, 0, 0, 1, 0),
            )
            for each in (key, value)
        ]
        by_token = query.transpose(1, 2).flatten(0, 1).unflatten(1, (groups, -1))
        tables = [range(1 + row * blocks, 1 + (row + 1) * blocks) for row in range(rows)]
        positions = torch.arange(length).expand(rows, -1)
        found = attend_pairs(
            by_token,
            entries=Entries(torch.arange(rows * length), positions, tables, self._size),
            keys=in_blocks[0].transpose(-1, -2).contiguous(),
            values=in_blocks[1],
            window=mask,
            scale=scale,
            softcap=softcap,
            least=self._least,
        )
        return found.unflatten(0, (rows, length))
