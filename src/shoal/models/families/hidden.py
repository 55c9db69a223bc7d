"""Hidden states of families whose base model is not one call on a row of tokens: ViT, T5.

Shapes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import ModelError
from shoal.models.forward_context import ROW_STRIDE, get_forward_context, set_forward_context

Hidden = Callable[[nn.Module, dict[str, Tensor]], Tensor]
"""Runs a model without its head on a batch; called inside the batch's forward context."""


def first_token_of_image(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """`pixel_values` [B, channels, height, width] -> [B, D]: what ViT's classifier reads."""
    config: Any = model.config
    base: Any = model.get_submodule(str(model.base_model_prefix))
    pixels = batch["pixel_values"]
    if config.image_size % config.patch_size:
        raise ModelError(
            f"model: image_size {config.image_size} is no multiple of patch_size "
            f"{config.patch_size}, so some pixels would never be read\n"
            "    choose another model.patch_size"
        )
    patches = (pixels.shape[-2] // config.patch_size) * (pixels.shape[-1] // config.patch_size)
    indices = _indices(batch, num_tokens=patches + 1)
    with set_forward_context(replace(get_forward_context(), token_indices=indices)):
        hidden: Tensor = base(pixel_values=pixels).last_hidden_state[:, 0]
    return hidden


def detection_tokens_of_image(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """`pixel_values` [B, channels, height, width] -> [B, Q, D]: what YOLOS' two heads read."""
    config: Any = model.config
    base: Any = model.get_submodule(str(model.base_model_prefix))
    pixels, size, tokens = batch["pixel_values"], config.patch_size, config.num_detection_tokens
    if any(side % size for side in pixels.shape[-2:]):
        raise ModelError(
            f"model: images of {tuple(pixels.shape[-2:])} pixels are no multiple of patch_size "
            f"{size}, so some pixels would never be read\n    choose another model.patch_size"
        )
    patches = (pixels.shape[-2] // size) * (pixels.shape[-1] // size)
    indices = _indices(batch, num_tokens=1 + patches + tokens)
    with set_forward_context(replace(get_forward_context(), token_indices=indices)):
        hidden: Tensor = base(pixel_values=pixels).last_hidden_state[:, -tokens:]
    return hidden


def hidden_of_decoder(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """`input_ids` and `decoder_input_ids` [B, T] (masks optional) -> [B, T, D] before the head.

    T5 scales what its tied head reads (config.scale_decoder_outputs): that scale is in here.
    """
    parts: Any = model
    mask, ids = batch.get("attention_mask"), batch["decoder_input_ids"]
    memory = parts.encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    # the decoder's tokens are other tokens than the encoder's: they lie in the row's second half
    indices = _indices(batch, num_tokens=ids.shape[1], offset=ROW_STRIDE // 2)
    with set_forward_context(replace(get_forward_context(), token_indices=indices)):
        hidden: Tensor = parts.decoder(
            input_ids=ids,
            attention_mask=batch.get("decoder_attention_mask"),
            encoder_hidden_states=memory,
            encoder_attention_mask=mask,
            use_cache=False,
        ).last_hidden_state
    if getattr(parts.config, "scale_decoder_outputs", False):
        hidden = hidden * parts.config.d_model**-0.5
    return hidden


HIDDEN: dict[str, Hidden] = {
    "first_token_of_image": first_token_of_image,
    "detection_tokens_of_image": detection_tokens_of_image,
    "hidden_of_decoder": hidden_of_decoder,
}
"""By the name that a family's entry gives."""


def _indices(batch: dict[str, Tensor], *, num_tokens: int, offset: int = 0) -> Tensor | None:
    """Global token indices [B, num_tokens] that key the dropout, where samples are known."""
    samples = batch.get("sample_ids")
    if samples is None:
        return None
    return samples[:, None] * ROW_STRIDE + offset + torch.arange(num_tokens, device=samples.device)
