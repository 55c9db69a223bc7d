"""Compilation block by block: all blocks of a model share their code, so it is compiled once."""

from __future__ import annotations

import torch
from torch import nn

from shoal.models.anatomy import Anatomy
from shoal.parallel.local import Holdings
from shoal.parallel.mesh import Mesh
from shoal.parallel.settings import Settings
from shoal.parallel.stages import own_blocks


def apply_compile(
    model: nn.Module, anatomy: Anatomy, mesh: Mesh, holdings: Holdings, settings: Settings
) -> Holdings:
    """Compile the forward of every block; names of parameters stay as they are."""
    if not settings.compile:
        return holdings
    for block in own_blocks(model, anatomy):
        block.forward = torch.compile(block.forward)
    return holdings
