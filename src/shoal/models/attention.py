"""Attention that keeps packed documents apart: registers `shoal` with transformers.

transformers asks the mask interface once per forward and kind of mask (full, sliding) and hands the
result to every block as an argument, so the mask is built once, and recompute repeats it.

Shapes: B rows, H heads, K key heads (H is a multiple), T tokens, S keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from shoal.errors import ModelError
from shoal.models.cpu_attention import attend_in_blocks, is_suited
from shoal.models.passage import current

NAME = "shoal"
"""The value of `attn_implementation` under which this attention is known to transformers."""


def register() -> None:
    """Make `attn_implementation="shoal"` known to transformers. Calling it again is harmless."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, build_mask)


def one_document_each(document_ids: Tensor) -> bool:
    """Whether each row [B, T] is one document, perhaps followed by padding (-1)."""
    same = (document_ids == document_ids[:, :1]) | (document_ids < 0)
    padding_last = (document_ids[:, 1:] < 0) | (document_ids[:, :-1] >= 0)
    return bool(same.all()) and bool(padding_last.all())


def build_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """The mask of one forward, bool [B or 1, 1, T, S] (True = may look); None where none is needed.

    The keywords are those of transformers' mask interface: `mask_function(b, h, q, k)` says what
    the layer allows (causal, window); to it is added that both tokens are of one document. Padding
    (-1) counts as a document, so that no row of the mask is empty.
    """
    if use_vmap:
        raise ModelError(
            "attention: this model overlays its own mask pattern, which shoal's attention does not "
            "know\n    use a model with causal, sliding-window or bidirectional attention"
        )
    documents = current().document_ids
    if documents is not None and documents.shape != (batch_size, q_length):
        raise ModelError(
            f"document_ids: expected shape {(batch_size, q_length)} like input_ids, "
            f"got {tuple(documents.shape)}"
        )
    window = local_size if local_size is not None and local_size < kv_length else None
    plain = window is None and attention_mask is None
    if plain and q_length == kv_length:
        if documents is None and (allow_is_causal_skip or allow_is_bidirectional_skip):
            return None
        skip = allow_is_causal_skip or allow_is_bidirectional_skip
        if documents is not None and skip and one_document_each(documents):
            if not allow_is_bidirectional_skip or bool((documents >= 0).all()):
                return None  # causal: no token sees the padding that follows it
            return (documents >= 0)[:, None, None, :].expand(-1, 1, q_length, -1)
    rows = torch.arange(batch_size, device=device)[:, None, None, None]
    heads = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    queries = (torch.arange(q_length, device=device) + q_offset)[None, None, :, None]
    keys = (torch.arange(kv_length, device=device) + kv_offset)[None, None, None, :]
    mask = mask_function(rows, heads, queries, keys)
    mask = torch.as_tensor(mask, device=device).expand(-1, 1, q_length, kv_length)
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, None, -kv_length:].bool()
    if documents is not None and q_length == kv_length:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    return mask


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: query [B, H, T, D], key and value [B, K, S, D] -> [B, T, H, D].

    `attention_mask` is what `build_mask` gave; a `position_bias` [1, H, T, S] (T5) is added to the
    scores. Raises ModelError for terms it does not know (sinks), and for dropout of probabilities
    unless the model keeps `framework` dropout: that dropout has no key, so the loss would depend on
    the layout.
    """
    if extras.get("s_aux") is not None:
        raise ModelError(
            f"{type(module).__name__}: attention with 's_aux' is not supported by shoal\n"
            "    choose another model family"
        )
    if dropout and not getattr(module, "framework_dropout", False):
        raise ModelError(
            f"{type(module).__name__}: dropout of attention probabilities ({dropout}) has no key\n"
            "    set model.dropout to off, or to framework if the curve may depend on the layout"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # a causal layer's mask never lets a token look ahead: blocks then need not look there either
    query, key, value = _as_autocast(query, key, value)
    bias = extras.get("position_bias")
    if bias is not None:
        attention_mask = _masked_bias(bias, attention_mask, causal=causal).to(query.dtype)
    if softcap is None and bias is None and is_suited(query, key, dropout=dropout):
        return attend_in_blocks(
            query, key=key, value=value, mask=attention_mask, causal=causal, scale=scale
        ), None
    causal = causal and attention_mask is None and query.shape[2] > 1
    if softcap is not None:
        weights = _capped_weights(query, key, attention_mask, causal, scale, softcap)
        repeated = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return (weights @ repeated).transpose(1, 2), None
    grouped = query.shape[1] != key.shape[1]
    if grouped and attention_mask is not None and query.device.type == "cuda":
        # with a mask, grouped heads fall back to the kernel that holds all scores
        share = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(share, dim=1) for each in (key, value))
        grouped = False
    output = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scale,
        enable_gqa=grouped,
    )
    return output.transpose(1, 2), None


def _as_autocast(*tensors: Tensor) -> list[Tensor]:
    """In the type of the region: rotary embeddings leave float32 queries beside bfloat16 values."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [each.to(torch.get_autocast_dtype(device)) for each in tensors]


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
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
