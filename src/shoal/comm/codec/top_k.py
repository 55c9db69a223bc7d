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


class TopOfBlocks(Codec):
    """`fraction` of each `block` of values, by magnitude: a byte for the place, a bfloat16 value.

    Each rank sends (size - 1) x 3 bytes for each value that it chooses, as many from every part of
    the model, whose gradients differ in size.
    """

    def __init__(self, *, fraction: float, block: int) -> None:
        self.block, self.count = block, max(1, math.ceil(fraction * block))

    def sum_(self, group: Group, values: Tensor, *, key: int) -> Tensor:
        numel, blocks = values.numel(), -(-values.numel() // self.block)
        rows = values.new_zeros(blocks * self.block, dtype=torch.float32)
        rows[:numel] = values
        rows = rows.view(blocks, self.block)
        places = torch.topk(rows.abs(), self.count, dim=1, sorted=False).indices
        chosen = rows.gather(1, places).to(torch.bfloat16)
        sent = torch.zeros_like(rows).scatter_(1, places, chosen.float())
        wire = torch.cat([places.to(torch.uint8), chosen.view(torch.uint8)], dim=1)
        total = torch.zeros_like(rows)
        for each in group.gather(wire):
            at, theirs = each[:, : self.count].long(), each[:, self.count :].contiguous()
            total.scatter_add_(1, at, theirs.view(torch.bfloat16).float())
        values.copy_(total.view(-1)[:numel])
        return sent.view(-1)[:numel].to(values.dtype)


class TopOfSixteen(Codec):
    """`fraction` of each 16 values, by magnitude: four bits for the place, four for the value.

    The values of 256 share a scale, a float32, so each rank sends (size - 1) x 1 byte for each
    value that it chooses and 4 for each 256 that it has: at 2 of 16 an eighth of the values in 3.5
    percent of their bytes. What rounding leaves is owed as what was left out is.
    """

    block, scaled, levels = 16, 256, 7

    def __init__(self, *, fraction: float) -> None:
        self.count = max(1, math.ceil(fraction * self.block))

    def sum_(self, group: Group, values: Tensor, *, key: int) -> Tensor:
        numel, parts = values.numel(), -(-values.numel() // self.scaled)
        rows = values.new_zeros(parts * self.scaled, dtype=torch.float32)
        rows[:numel] = values
        rows = rows.view(parts, -1, self.block)
        places = torch.topk(rows.abs(), self.count, dim=2, sorted=False).indices
        chosen = rows.gather(2, places)
        scales = chosen.abs().amax(dim=(1, 2)) / self.levels
        scales = torch.where(torch.isfinite(scales), scales, torch.nan)
        codes = (chosen / scales.view(-1, 1, 1)).nan_to_num_(0.0).round_() + self.levels
        packed = (places * 16 + codes.long()).to(torch.uint8).view(parts, -1)
        wire = torch.cat([packed, scales.view(-1, 1).view(torch.uint8)], dim=1)
        total = torch.zeros_like(rows)
        for each in group.gather(wire):
            total += self._decoded(each, rows)
        values.copy_(total.view(-1)[:numel])
        return self._decoded(wire, rows).view(-1)[:numel].to(values.dtype)

    def _decoded(self, wire: Tensor, like: Tensor) -> Tensor:
        """What `wire`, uint8 [parts, bytes], says, as float32 of the shape of `like`."""
        packed = wire[:, :-4].view(*like.shape[:2], self.count).long()
        scales = wire[:, -4:].contiguous().view(torch.float32).view(-1, 1, 1)
        found = (packed % 16 - self.levels) * scales
        return torch.zeros_like(like).scatter_(2, packed // 16, found)
