"""Gives a cut model its values: each rank draws, or reads, only the boxes that it holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shoal.models.draw import InitRecord
from shoal.models.init import Source
from shoal.parallel.local import sharded_of
from shoal.parallel.shard import adopt, storage_shapes


@torch.no_grad()
def materialise(
    model: nn.Module,
    *,
    record: InitRecord,
    seed: int,
    source: Source | None = None,
    storage: dict[str, Tensor] | None = None,
    gradients: dict[str, Tensor] | None = None,
    fill: bool = True,
) -> None:
    """Make a model that `parallel.apply` has cut real, in place: float32, on the mesh's device (an
    offloaded one on the CPU).

    Values come from `source`, or else are drawn (models/init.py). `storage` and `gradients`: zeroed
    memory by canonical name for parameters and gradients, of the shapes `shard.storage_shapes`
    gives; None: memory of its own, and no gradients yet. Buffers are recomputed. `fill` False:
    the storage has its values already, or gets them later.
    Raises ModelError for a weight that nothing initialises.
    """
    sharded = sharded_of(model)
    if storage is None:
        shapes, where = storage_shapes(model), sharded.storage_device
        storage = {n: torch.zeros(shape, device=where) for n, shape in shapes.items()}
    kept, slots = storage, gradients or {}
    adopt(model, kept.__getitem__, slots.get)
    for name, holding in sharded.holdings.items() if fill else ():
        for slot in holding.slots:
            value = source.tensor(name, box=slot.box) if source is not None else None
            if value is None:
                value = record.draw(name, seed=seed, box=slot.box)
            slot.of(kept[name]).copy_(value)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        for leaf, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                name = f"{path}.{leaf}" if path else leaf
                module._buffers[leaf] = record.draw(name, seed=seed).to(sharded.mesh.device)
