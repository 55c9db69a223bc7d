"""The cache of keys and values in blocks, and attention over it: the kernel of serving.

Every product has one inner length (the head size, or the tokens of a block), blocks are summed in
one fixed tree, and what lies behind a sequence's end adds exact zeros: so a token's bits depend
neither on how many are computed at once nor on how a prompt was cut into chunks.

Shapes: E entries, B blocks, S tokens of a block, K key heads, G = heads of each, R rows (G times
the tokens of an entry), D head size of keys, V of values, T tokens of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as functional
from torch import Tensor

from shoal.errors import ModelError
from shoal.models.kernels import MaskRequest

SINK = 0
"""The block that padding is written to and read from."""
_ALONE = 8
"""Tokens of an entry up to which each is attended as an entry of its own, with others' batched."""
_LEAST = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Span:
    """Tokens of one sequence in a step: where they stand in it, and where their blocks are."""

    start: int
    """Position of the first."""
    count: int
    blocks: tuple[int, ...]
    """Of the whole sequence so far, this step's tokens too."""


Hides = Callable[..., Tensor]


@dataclass
class Entries:
    """Entries that are attended in one call: their columns of the step, positions and blocks."""

    columns: Tensor
    """int64 [E, N]: N tokens each."""
    positions: Tensor
    """int64 [E, N]."""
    tables: Tensor
    """int64 [E, B]."""
    hidden: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)
    """By window and heads of a group: what a row may not see, bool [E, B, 1, R, S]."""

    def may_not_see(self, window: int | None, *, share: int, size: int, rows: int) -> Tensor:
        """Computed once in a step, for all layers. `rows`: of each entry, padding too."""
        found = self.hidden.get((window, share))
        if found is None:
            at = self.positions.repeat_interleave(share, dim=1)
            at = functional.pad(at, (0, rows - at.shape[1]))[:, None, None, :, None]
            blocks = self.tables.shape[1]
            ahead = torch.arange(blocks * size).view(1, blocks, 1, 1, size) - at
            found = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
            self.hidden[window, share] = found
        return found


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

    def write(self, layer: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Keep keys [T, K, D] and values [T, K, V] at `slots` [T] (block x S + place)."""
        if layer not in self.keys:
            heads, size = key.shape[1:]
            shape = (self.num_blocks, heads, size, self.block_tokens)
            self.keys[layer] = key.new_zeros(shape)
            self.values[layer] = value.new_zeros(
                (self.num_blocks, heads, self.block_tokens, value.shape[-1])
            )
        blocks, places = slots // self.block_tokens, slots % self.block_tokens
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
        single: dict[int, list[tuple[int, int, tuple[int, ...]]]] = {}
        self._entries: list[Entries] = []
        for span in spans:
            first = len(slots)
            places = range(span.start, span.start + span.count)
            slots += [span.blocks[at // size] * size + at % size for at in places]
            if span.count <= _ALONE:
                for at in places:
                    seen = at // size + 1
                    column = first + at - span.start
                    wide = 1 << (seen - 1).bit_length()
                    single.setdefault(wide, []).append((column, at, span.blocks[:seen]))
            else:
                columns = torch.arange(first, first + span.count)[None]
                seen = (span.start + span.count - 1) // size + 1
                table = torch.tensor(span.blocks[:seen])[None]
                self._entries.append(Entries(columns, torch.tensor([list(places)]), table))
        padding = num_tokens - len(slots)
        if padding:
            rest = range(len(slots), num_tokens)
            single.setdefault(1, []).extend((column, 0, (SINK,)) for column in rest)
            slots += [SINK * size] * padding
        for wide, found in single.items():
            tables = torch.full((len(found), wide), SINK)
            for row, (_, _, blocks) in enumerate(found):
                tables[row, : len(blocks)] = torch.tensor(blocks)
            self._entries.append(
                Entries(
                    torch.tensor([[column] for column, _, _ in found]),
                    torch.tensor([[at] for _, at, _ in found]),
                    tables,
                )
            )
        self._slots = torch.tensor(slots)

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
        cache = self._cache
        cache.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1), self._slots)
        keys, values = cache.keys[layer], cache.values[layer]
        groups = key.shape[1]
        by_token = query[0].transpose(0, 1).unflatten(1, (groups, -1))  # [T, K, G, D]
        output = query.new_empty(self._num, query.shape[1], value.shape[-1])
        for each in self._entries:
            found = attend_blocks(
                by_token[each.columns],
                keys=keys[each.tables],
                values=values[each.tables],
                hides=partial(each.may_not_see, mask),
                scale=scale,
                softcap=softcap,
                least=self._least,
            )
            if len(self._entries) == 1:  # all of them, in order
                return found.flatten(0, 1)[None]
            output[each.columns] = found
        return output[None]


def attend_blocks(
    query: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    hides: Hides,
    scale: float,
    softcap: float | None,
    least: int,
) -> Tensor:
    """query [E, N, K, G, D], keys [E, B, K, D, S], values [E, B, K, S, V] -> [E, N, K x G, V].

    `hides`: see `Entries.may_not_see`; the first key of block b stands at b x S. Softmax over
    blocks with the exact maximum of all (Flash-decoding's sums, arXiv 2307.08691, in a fixed tree).
    """
    entries, tokens, heads, share, _ = query.shape
    blocks, size = keys.shape[1], keys.shape[-1]
    rows = tokens * share
    missing = -rows % least
    # [E, K, R, D], the rows of a token beside one another
    shaped = query.permute(0, 2, 1, 3, 4).reshape(entries, heads, rows, -1) * scale
    if missing:
        shaped = functional.pad(shaped, (0, 0, 0, missing))
    spread = shaped[:, None].expand(-1, blocks, -1, -1, -1).flatten(0, 2)
    scores = torch.bmm(spread, keys.flatten(0, 2)).view(entries, blocks, heads, -1, size)
    scores = scores.float() if scores.dtype == torch.bfloat16 else scores
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(hides(share=share, size=size, rows=rows + missing), -torch.inf)
    highest = scores.amax(dim=(1, 4), keepdim=True).detach()
    weights = torch.exp(scores - highest)
    total = _tree(weights.sum(dim=-1))
    parts = torch.bmm(weights.to(values.dtype).flatten(0, 2), values.flatten(0, 2))
    parts = parts.view(entries, blocks, heads, rows + missing, -1)
    summed = _tree(parts.float() if parts.dtype == torch.bfloat16 else parts)
    output = (summed / total[..., None])[:, :, :rows].to(query.dtype)
    shape = (entries, heads, tokens, share, -1)
    return output.reshape(shape).permute(0, 2, 1, 3, 4).flatten(2, 3)


def _tree(parts: Tensor) -> Tensor:
    """The sum over dim 1 in one binary tree of neighbours: more zeros behind change no bit."""
    while parts.shape[1] > 1:
        if parts.shape[1] % 2:
            parts = torch.cat([parts, torch.zeros_like(parts[:, :1])], dim=1)
        parts = parts[:, 0::2] + parts[:, 1::2]
    return parts[:, 0] + 0.0  # a lone -0 becomes 0, as it does beside zeros


@torch.no_grad()
def least_rows(
    *, size: int, value_size: int, block_tokens: int, dtype: torch.dtype
) -> tuple[int, bool]:
    """(multiple of rows, proven): the least one at which rows of attention keep their bits."""
    generator = torch.Generator().manual_seed(2)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

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
        keys, values = (functional.pad(each, (0, 0, 0, missing)) for each in (key, value))
        blocks = (length + missing) // self._size
        in_blocks = [
            each.unflatten(2, (blocks, self._size)).transpose(1, 2) for each in (keys, values)
        ]
        by_token = query.transpose(1, 2).unflatten(2, (groups, -1))
        places = torch.arange(length).expand(rows, -1)
        entries = Entries(places, places, places.new_zeros(rows, blocks))
        return attend_blocks(
            by_token,
            keys=in_blocks[0].transpose(-1, -2).contiguous(),
            values=in_blocks[1].contiguous(),
            hides=partial(entries.may_not_see, mask),
            scale=scale,
            softcap=softcap,
            least=self._least,
        )
