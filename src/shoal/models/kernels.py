"""Kernels of attention: the protocol, and the one that has all keys of its rows at hand.

Context parallelism and the cache of serving are kernels too: whoever runs the forward puts one into
its context (models/forward_context.py).

Shapes: B rows, H heads, K key heads (H is a multiple), T tokens, S keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
import torch.nn.functional as functional
from torch import Tensor

from shoal.errors import ModelError
from shoal.models.cpu_attention import attend_in_blocks, is_suited

Mask: TypeAlias = Any
"""What a kernel's own `mask` gave, handed back to it by every layer."""


@dataclass(frozen=True, kw_only=True)
class MaskRequest:
    """What a mask is to say: one of each kind (full, sliding) per forward."""

    batch_size: int
    num_queries: int
    num_keys: int
    allowed: Callable[..., Any]
    """(row, head, query, key) -> whether the layer's pattern lets the query see the key; ints or
    tensors of positions."""
    first_query: int = 0
    first_key: int = 0
    window: int | None = None
    """Tokens that a sliding pattern sees."""
    attention_mask: Tensor | None = None
    """bool [B, S]: keys that the caller hides (False)."""
    document_ids: Tensor | None = None
    """int [B, T], -1 = padding: a token sees its own document only."""
    row_document_ids: Tensor | None = None
    """Those of whole rows, of which this forward has a part."""
    skips_causal: bool = True
    """A causal pattern needs no mask: the layer says that it is causal."""
    skips_bidirectional: bool = False
    """A pattern that hides nothing needs no mask."""
    device: torch.device | str = "cpu"


class Kernel(Protocol):
    """How the tokens of a forward attend to one another.

    `by_layer`: whether it must know which layer calls. Compiled code that reads the number is
    compiled for each layer anew, and after eight of them no longer.
    """

    @property
    def by_layer(self) -> bool: ...

    def mask(self, request: MaskRequest) -> Tensor | Mask | None:
        """Once per forward and kind of mask; None where none is needed."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int,
        mask: Tensor | Mask | None,
        causal: bool,
        scale: float,
        softcap: float | None,
        bias: Tensor | None,
    ) -> Tensor:
        """query [B, H, T, D], key and value [B, K, T, D] -> [B, T, H, D]; differentiable.

        `layer`: its number (-1: not `by_layer`, or it has none). `mask`: what this kernel's `mask`
        gave; `causal`: no token looks ahead, with a mask as well as without. Scores are scaled by
        `scale`, squashed to +-`softcap`, and `bias` [1, H, T, S] is added to them.
        """


@dataclass(frozen=True)
class LocalKernel:
    """All keys are those of this forward. `dropout`: of probabilities, unkeyed (`framework`)."""

    dropout: float = 0.0
    by_layer: ClassVar[bool] = False

    def mask(self, request: MaskRequest) -> Tensor | None:
        """bool [B or 1, 1, T, S] (True = may look); None where none is needed.

        Padding (-1) counts as a document, so that no row of the mask is empty.
        """
        documents, queries, keys = request.document_ids, request.num_queries, request.num_keys
        window = request.window if request.window is not None and request.window < keys else None
        skips = request.skips_causal or request.skips_bidirectional
        if window is None and request.attention_mask is None and queries == keys and skips:
            if documents is None:
                return None
            if one_document_each(documents):
                if not request.skips_bidirectional or bool((documents >= 0).all()):
                    return None  # causal: no token sees the padding that follows it
                return (documents >= 0)[:, None, None, :].expand(-1, 1, queries, -1)
        rows, columns = (
            torch.arange(first, first + count, device=request.device)
            for first, count in ((request.first_query, queries), (request.first_key, keys))
        )
        batch = torch.arange(request.batch_size, device=request.device)[:, None, None, None]
        head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=request.device)
        seen = request.allowed(batch, head, rows[None, None, :, None], columns[None, None, None])
        mask = torch.as_tensor(seen, device=request.device).expand(-1, 1, queries, keys)
        if request.attention_mask is not None:
            mask = mask & request.attention_mask[:, None, None, -keys:].bool()
        if documents is not None and queries == keys:
            mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
        return mask

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layer: int,
        mask: Tensor | Mask | None,
        causal: bool,
        scale: float,
        softcap: float | None,
        bias: Tensor | None,
    ) -> Tensor:
        """See `Kernel`; key and value may have more tokens than the query: [B, K, S, D]."""
        if bias is not None:
            mask = _masked_bias(bias, mask, causal=causal).to(query.dtype)
        if softcap is None and bias is None and is_suited(query, key, dropout=self.dropout):
            # a causal layer's mask never lets a token look ahead: nor need blocks look there
            return attend_in_blocks(
                query, key=key, value=value, mask=mask, causal=causal, scale=scale
            )
        causal = causal and mask is None and query.shape[2] > 1
        if softcap is not None:
            weights = _capped_weights(query, key, mask, causal, scale, softcap)
            repeated = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
            return (weights @ repeated).transpose(1, 2)
        grouped = query.shape[1] != key.shape[1]
        if grouped and mask is not None and query.device.type == "cuda":
            # with a mask, grouped heads fall back to the kernel that holds all scores
            share = query.shape[1] // key.shape[1]
            key, value = (each.repeat_interleave(share, dim=1) for each in (key, value))
            grouped = False
        output = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout,
            is_causal=causal,
            scale=scale,
            enable_gqa=grouped,
        )
        return output.transpose(1, 2)


local = LocalKernel()


def with_dropout(kernel: Kernel, probability: float) -> Kernel:
    """`kernel` with dropout of probabilities. Raises ModelError for any but the local one."""
    if not isinstance(kernel, LocalKernel):
        raise ModelError(
            f"{type(kernel).__name__}: it does not drop probabilities of attention "
            f"({probability})\n    set model.dropout to off or keyed"
        )
    return LocalKernel(probability)


def one_document_each(document_ids: Tensor) -> bool:
    """Whether each row [B, T] is one document, perhaps followed by padding (-1)."""
    same = (document_ids == document_ids[:, :1]) | (document_ids < 0)
    padding_last = (document_ids[:, 1:] < 0) | (document_ids[:, :-1] >= 0)
    return bool(same.all()) and bool(padding_last.all())


def _masked_bias(bias: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """A bias of the scores with -inf where a token may not look."""
    if mask is None and causal and bias.shape[-2] > 1:
        mask = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
    return bias if mask is None else bias.masked_fill(~mask, -torch.inf)


def _capped_weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
) -> Tensor:
    """Probabilities [B, H, T, S] with scores squashed to +-softcap (Gemma 2, arXiv 2408.00118)."""
    repeated = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.tanh(query @ repeated.transpose(-1, -2) * scale / softcap) * softcap
    if causal:
        length = query.shape[2]
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return scores.softmax(dim=-1, dtype=wide).to(query.dtype)
