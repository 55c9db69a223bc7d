"""A model with fewer blocks: those that change their input least are left out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shoal.compress.walk import Walk, influence
from shoal.compress.workers import Workers
from shoal.errors import UserError
from shoal.models.anatomy import Anatomy, canonical_parameters


@torch.no_grad()
def influences(
    model: nn.Module, anatomy: Anatomy, batches: Sequence[Tensor], workers: Workers
) -> list[float]:
    """Of each block on token ids [n, T], in order."""
    walk = Walk.begin(model, anatomy, batches, workers)
    found = []
    for name in walk.blocks:
        before = walk.hidden
        walk.step(name)
        found.append(influence(before, walk.hidden))
    return found


def without_blocks(
    model: nn.Module, anatomy: Anatomy, *, dropped: Sequence[int]
) -> tuple[Any, dict[str, Tensor]]:
    """The configuration and the parameters, by canonical name, of the model without some blocks.

    Raises UserError where none would be left.
    """
    gone, count = set(dropped), anatomy.num_blocks
    if len(gone) >= count:
        raise UserError(f"--prune layers:{len(gone)}: the model has {count}; leave at least one")
    kept = [number for number in range(count) if number not in gone]
    config: Any = copy.deepcopy(model.config)
    for key, value in vars(config).items():  # what is told of each layer, such as its type
        if isinstance(value, list) and len(value) == count and key != "architectures":
            setattr(config, key, [value[number] for number in kept])
    size = "n_layer" if "n_layer" in vars(config) else "num_hidden_layers"
    setattr(config, size, len(kept))
    renumbered = {f"{anatomy.blocks}.{old}.": new for new, old in enumerate(kept)}
    tensors = {}
    for name, parameter in canonical_parameters(model).items():
        if name.startswith(f"{anatomy.blocks}."):
            number = name[len(anatomy.blocks) + 1 :].partition(".")[0]
            prefix = f"{anatomy.blocks}.{number}."
            if prefix not in renumbered:
                continue
            name = f"{anatomy.blocks}.{renumbered[prefix]}.{name[len(prefix) :]}"
        tensors[name] = parameter.detach()
    return config, tensors
