"""First values of parameters that a class makes as zeros and leaves so.

YOLOS is published with weights, and its class begins with the same zeros at every place and for
every detection token. A model that is to learn from nothing needs places that can be told apart.
Shapes: P patches, Q detection tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shoal.models.draw import Operation

First = dict[str, Operation]

_PLACES = 0.5  # of a sine's height
_WAVES = 8.0  # half waves across an image, of the finest


def _yolos(config: Any) -> First:
    """Waves of the place for patches, and for detection tokens of that of their cell.

    Tokens are taken row by row as the cells of a square grid, so that a token finds the patches
    around its cell by the same projections as any other token; the last ones of a number that is
    no square begin as those of the first cells.
    """
    height, width = (size // config.patch_size for size in config.image_size)
    tokens, hidden = config.num_detection_tokens, config.hidden_size
    side = max(1, math.isqrt(tokens))
    cells = _waves(side, side, hidden=hidden)
    cells = cells[torch.arange(tokens) % len(cells)]
    patches = _waves(height, width, hidden=hidden)
    places = torch.cat([torch.zeros(1, hidden), patches, cells])[None]
    drawn = Operation("normal", (0.0, float(config.initializer_range)))
    return {
        "vit.embeddings.cls_token": drawn,
        "vit.embeddings.detection_tokens": drawn,
        "vit.embeddings.position_embeddings": Operation("values", values=places),
    }


def _waves(rows: int, columns: int, *, hidden: int) -> Tensor:
    """Sines and cosines of the middle of each cell of a grid, row by row [rows * columns, D]."""
    quarter = -(-hidden // 4)
    waves = math.pi * (1 + _WAVES * torch.arange(quarter) / quarter)
    parts = []
    for size in (rows, columns):
        angles = (torch.arange(size) + 0.5)[:, None] / size * waves
        parts.append(torch.cat([angles.sin(), angles.cos()], dim=1))
    down = parts[0].repeat_interleave(columns, dim=0)
    return _PLACES * torch.cat([down, parts[1].repeat(rows, 1)], dim=1)[:, :hidden]


FIRST: dict[str, Callable[[Any], First]] = {"yolos": _yolos}
"""By model type."""
