"""Checks of a model at build, on a few tokens: that packing and keyed dropout are right for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import ModelError
from shoal.legal import family_of
from shoal.models.anatomy import example_of, hidden_of

_DOCUMENT = 8
"""Tokens per document of the probe."""


@torch.no_grad()
def probe_packing(model: nn.Module) -> None:
    """Change document 1 of a packed row and demand bit-equal outputs in document 2.

    Raises ModelError, naming the family, when document 2 moves, or when it differs from the same
    document in a row of its own by more than rounding.
    """
    config: Any = model.config
    family = config.model_type
    if not family_of(family).packs:
        raise ModelError(
            f"{family}: its rows hold one sample each, so this family cannot be packed\n"
            "    set data.packing to false"
        )
    vocabulary = config.vocab_size
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        before = hidden_of(model, _packed(vocabulary, changed=False, device=device))
        after = hidden_of(model, _packed(vocabulary, changed=True, device=device))
        alone = hidden_of(model, _second(vocabulary, device=device))
    finally:
        model.train(training)
    moved = not torch.equal(before[:, _DOCUMENT:], after[:, _DOCUMENT:])
    # kernels sum in another order over 16 keys than over 8; a leak moves the output by its own size
    scale = float(alone.abs().max().clamp(min=1e-6))
    differs = float((before[:, _DOCUMENT:] - alone).abs().max()) > 1e-3 * scale
    if moved or differs:
        what = "sees the document before it" if moved else "differs from the same document alone"
        raise ModelError(
            f"{family}: a packed document {what}, so this family cannot be packed\n"
            "    set data.packing to false"
        )


def probe_keyed_dropout(model: nn.Module) -> None:
    """Two training forwards of one batch must agree bit for bit under keyed dropout.

    Raises ModelError, naming the class, for a model that drops in ways that have no key.
    """
    batch = example_of(model)
    batch["sample_ids"] = torch.zeros(1, dtype=torch.int64, device=next(model.parameters()).device)
    training = model.training
    model.train()
    try:
        with torch.no_grad():
            first, second = hidden_of(model, batch), hidden_of(model, batch)
    finally:
        model.train(training)
    if not torch.equal(first, second):
        raise ModelError(
            f"{type(model).__name__}: it drops values in its own code, which has no key, so the "
            "loss would depend on the layout\n    set model.dropout to off"
        )


def _packed(vocabulary: int, *, changed: bool, device: torch.device) -> dict[str, Tensor]:
    """One row of two documents; `changed`: other tokens in the first."""
    tokens = torch.arange(2 * _DOCUMENT, device=device)
    tokens[:_DOCUMENT] += 5 if changed else 0
    positions = torch.arange(_DOCUMENT, device=device).repeat(2)
    documents = torch.arange(2, device=device, dtype=torch.int32).repeat_interleave(_DOCUMENT)
    return {
        "input_ids": (tokens % vocabulary)[None],
        "position_ids": positions[None],
        "document_ids": documents[None],
    }


def _second(vocabulary: int, *, device: torch.device) -> dict[str, Tensor]:
    """The second document of `_packed` in a row of its own."""
    row = _packed(vocabulary, changed=False, device=device)
    return {
        "input_ids": row["input_ids"][:, _DOCUMENT:],
        "position_ids": row["position_ids"][:, _DOCUMENT:],
        "document_ids": torch.zeros(1, _DOCUMENT, dtype=torch.int32, device=device),
    }
