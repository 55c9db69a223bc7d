"""Registers `shoal` with transformers: attention by the kernel of the forward's context.

transformers asks the mask interface once per forward and kind of mask (full, sliding) and hands the
result to every block as an argument, so the mask is built once, and recompute repeats it.

Shapes: B rows, H heads, K key heads (H is a multiple), T tokens, S keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from shoal.errors import ModelError
from shoal.models.forward_context import get_forward_context
from shoal.models.kernels import Mask, MaskRequest, with_dropout

NAME = "shoal"
"""The value of `attn_implementation` under which this attention is known to transformers."""


def register() -> None:
    """Make `attn_implementation="shoal"` known to transformers. Calling it again is harmless."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, build_mask)


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
) -> Tensor | Mask | None:
    """The mask of one forward, as the context's kernel has it; None where none is needed.

    The keywords are those of transformers' mask interface: `mask_function(b, h, q, k)` says what
    the layer allows (causal, window); to it is added that both tokens are of one document.
    Raises ModelError for patterns that a model overlays, and for documents of another shape.
    """
    if use_vmap:
        raise ModelError(
            "attention: this model overlays its own mask pattern, which shoal's attention does not "
            "know\n    use a model with causal, sliding-window or bidirectional attention"
        )
    context = get_forward_context()
    documents = context.document_ids
    if documents is not None and documents.shape != (batch_size, q_length):
        raise ModelError(
            f"document_ids: expected shape {(batch_size, q_length)} like input_ids, "
            f"got {tuple(documents.shape)}"
        )
    request = MaskRequest(
        batch_size=batch_size,
        num_queries=q_length,
        num_keys=kv_length,
        allowed=mask_function,
        first_query=q_offset,
        first_key=kv_offset,
        window=local_size,
        attention_mask=attention_mask,
        document_ids=documents,
        row_document_ids=context.row_document_ids,
        skips_causal=allow_is_causal_skip,
        skips_bidirectional=allow_is_bidirectional_skip,
        device=device,
    )
    return context.kernel.mask(request)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Mask | None,
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
    kernel = get_forward_context().kernel
    layer = getattr(module, "layer_idx", None) if kernel.by_layer else None
    if dropout:
        kernel = with_dropout(kernel, dropout)
    query, key, value = _as_autocast(query, key, value)
    output = kernel(
        query,
        key,
        value,
        layer=-1 if layer is None else layer,
        mask=attention_mask,
        causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        bias=extras.get("position_bias"),
    )
    return output, None


def _as_autocast(*tensors: Tensor) -> list[Tensor]:
    """In the type of the region: rotary embeddings leave float32 queries beside bfloat16 values."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [each.to(torch.get_autocast_dtype(device)) for each in tensors]
