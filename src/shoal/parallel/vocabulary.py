"""A head that was cut by its outputs: which of them a rank has, and what its ranks exchange."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import Tensor

from shoal.parallel.exchange import all_gather_into


@dataclass(frozen=True)
class Vocabulary:
    """The part of the vocabulary whose logits this rank has: `size` entries from `start`."""

    start: int
    size: int
    whole: int
    group: dist.ProcessGroup

    def gather(self, part: Tensor) -> Tensor:
        """This rank's logits [..., size] -> all logits [..., whole], on every rank."""
        ranks = dist.get_world_size(self.group)
        edges = [self.whole * rank // ranks for rank in range(ranks + 1)]
        sizes = [end - start for start, end in itertools.pairwise(edges)]
        padded = functional.pad(part, (0, max(sizes) - part.shape[-1])).contiguous()
        parts = padded.new_empty(ranks, *padded.shape)
        all_gather_into(parts.flatten(0, 1), padded, group=self.group)
        return torch.cat([each[..., :size] for each, size in zip(parts, sizes)], dim=-1)

    def exchange(self, mine: Tensor) -> Tensor:
        """Every rank's `mine` [K, N]: [ranks, K, N], in rank order."""
        parts = mine.new_empty(dist.get_world_size(self.group), *mine.shape)
        all_gather_into(parts.flatten(0, 1), mine, group=self.group)
        return parts
