"""Attention on a CPU in blocks of queries, with the probabilities kept for the backward.

torch's fused kernel for CPUs recomputes what a short row can keep, and multiplies bfloat16 slowly.
Here each block of queries sees the keys up to its end, by batched matrix products that share the
keys among the heads of a group. Forward and backward take, of the fused kernel's time (torch 2.13,
a core with bfloat16 instructions): 0.4 in bfloat16 for 8 rows of 256 tokens, 0.6 for 1,024 tokens
in either type, and 1.0 in float32 for 256.

Shapes: B rows, H heads, K key heads, G = H / K, T tokens, Q tokens of a block, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_QUERIES = 64
"""Queries per block: smaller blocks waste less on keys to come, larger ones fill the processor."""

_FLOAT32_TOKENS = 512
"""In float32 shorter rows gain nothing here."""

_KEPT_BYTES = 64 * 2**20
"""Probabilities that one layer may keep; beyond it the fused kernel is used."""


def is_suited(query: Tensor, key: Tensor, *, dropout: float) -> bool:
    """Whether this kernel takes the place of the fused one for these shapes."""
    rows, heads, length, _ = query.shape
    kept = rows * heads * length * length * query.element_size()
    gains = query.dtype == torch.bfloat16 or (
        query.dtype == torch.float32 and length >= _FLOAT32_TOKENS
    )
    return (
        gains
        and query.device.type == "cpu"
        and query.dtype == key.dtype
        and length == key.shape[2]
        and dropout == 0.0
        and kept <= _KEPT_BYTES
    )


def attend_in_blocks(
    query: Tensor,
    *,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """query [B, H, T, D], key and value [B, K, T, D] -> [B, T, H, D]. Differentiable once.

    `mask` bool, broadcastable to [B, 1, T, T], True = may look. `causal`: no token looks ahead
    (with a mask as well as without). Every token must be able to see at least one.
    """
    result: Tensor = _Blocks.apply(query, key, value, mask, causal, scale)  # type: ignore[no-untyped-call]
    return result


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
    ) -> Tensor:
        rows, heads, length, size = query.shape
        groups = key.shape[1]
        keys, values = (each.reshape(rows * groups, length, size) for each in (key, value))
        output = query.new_empty(rows, length, heads, size)
        kept: list[Tensor] = []
        with torch.autocast("cpu", enabled=False):
            for start in range(0, length, _QUERIES):
                stop = min(start + _QUERIES, length)
                seen = stop if causal else length
                block = _gather(query[:, :, start:stop] * scale, groups)
                # not bmm, whose result selective recompute keeps: this one is changed in place
                nothing = block.new_empty(1, 1, 1)
                scores = torch.baddbmm(nothing, block, keys[:, :seen].transpose(1, 2), beta=0.0)
                _hide(scores.view(rows, heads, stop - start, seen), mask, causal, start)
                weights = torch.softmax(scores, dim=-1)
                _scatter(output[:, start:stop], torch.bmm(weights, values[:, :seen]), groups)
                if any(ctx.needs_input_grad[:3]):
                    kept += [block, weights]
        ctx.save_for_backward(keys, values, *kept)
        ctx.causal, ctx.scale = causal, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        keys, values, *kept = ctx.saved_tensors
        rows, length, heads, size = gradient.shape
        groups = len(keys) // rows
        by_head = gradient.transpose(1, 2)
        query_gradient = gradient.new_empty(rows, length, heads, size)
        key_gradient, value_gradient = torch.zeros_like(keys), torch.zeros_like(values)
        with torch.autocast("cpu", enabled=False):
            for block, weights, start in zip(
                kept[::2], kept[1::2], range(0, length, _QUERIES), strict=True
            ):
                stop, seen = min(start + _QUERIES, length), weights.shape[-1]
                output_gradient = _gather(by_head[:, :, start:stop], groups)
                value_gradient[:, :seen].baddbmm_(weights.transpose(1, 2), output_gradient)
                pulled = torch.bmm(output_gradient, values[:, :seen].transpose(1, 2))
                scores = _softmax_backward(pulled, weights)
                into = query_gradient[:, start:stop]
                _scatter(into, torch.bmm(scores, keys[:, :seen]).mul_(ctx.scale), groups)
                key_gradient[:, :seen].baddbmm_(scores.transpose(1, 2), block)
        shape = (rows, groups, length, size)
        result = (query_gradient.transpose(1, 2), key_gradient.view(shape))
        return (*result, value_gradient.view(shape), None, None, None)


def _gather(by_head: Tensor, groups: int) -> Tensor:
    """[B, H, Q, D] -> [B x K, G x Q, D]: the queries of a group of heads under one another."""
    rows, heads, length, size = by_head.shape
    return by_head.reshape(rows * groups, heads // groups * length, size)


def _scatter(into: Tensor, block: Tensor, groups: int) -> None:
    """Write [B x K, G x Q, D] into a view [B, Q, H, D]."""
    rows, length, heads, size = into.shape
    shaped = block.view(rows, groups, heads // groups, length, size)
    into.unflatten(2, (groups, heads // groups)).copy_(shaped.permute(0, 3, 1, 2, 4))


def _hide(scores: Tensor, mask: Tensor | None, causal: bool, start: int) -> None:
    """Set scores [B, H, Q, S] that may not be seen to -inf, in place."""
    length, seen = scores.shape[-2:]
    if mask is not None:
        rows = mask if mask.shape[-2] == 1 else mask[..., start : start + length, :]
        scores.masked_fill_(~rows[..., :seen], -torch.inf)
    if causal:
        # only the block's own columns hold keys to come
        ahead = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
        scores[..., start:].masked_fill_(ahead, -torch.inf)


def _softmax_backward(gradient: Tensor, weights: Tensor) -> Tensor:
    """Gradient of the scores: weights x (gradient - their row's sum of weights x gradient)."""
    # the kernel behind softmax's own backward: one pass instead of four; no public name in 2.13
    result: Tensor = torch.ops.aten._softmax_backward_data(gradient, weights, -1, weights.dtype)
    return result
