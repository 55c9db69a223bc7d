"""Codec topk: the largest values alone cross, as pairs of index and value.

Every rank gathers everybody's pairs and adds them up in rank order. It needs error feedback: what
is left out is sent once it has grown (Stich et al., "Sparsified SGD with memory", arXiv
1809.07599).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shoal.comm.codec.codec import Codec
from shoal.comm.group import Group


class TopK(Codec):
    """`fraction` of the values, by magnitude; NaN counts as the largest, so it is never left out.

    Each rank sends (size - 1) x 8 bytes for each value that it chooses: more ranks, more traffic.
    """

    def __init__(self, *, fraction: float) -> None:
        self.fraction = fraction

    def chosen(self, numel: int) -> int:
        """How many of `numel` values cross."""
        return max(1, math.ceil(self.fraction * numel))

    def sum_(self, group: Group, values: Tensor, *, key: int) -> Tensor:
        count = self.chosen(values.numel())
        places = torch.topk(values.abs(), count, sorted=False).indices
        own = values[places].float()
        pairs = torch.stack([places.to(torch.int32), own.view(torch.int32)])
        sent = torch.zeros_like(values)
        sent[places] = own.to(values.dtype)
        total = torch.zeros_like(values)
        for at, each in group.gather(pairs):
            total.index_add_(0, at.long(), each.contiguous().view(torch.float32).to(values.dtype))
        values.copy_(total)
        return sent
