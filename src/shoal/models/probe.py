"""A check of a model on a few tokens: that keyed dropout is the same at every call."""

from __future__ import annotations

import torch
from torch import nn

from shoal.errors import ModelError
from shoal.models.anatomy import example_of, hidden_of


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
