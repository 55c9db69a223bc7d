"""The policies by kind: what `sync.kind` of a recipe names."""

from __future__ import annotations

from torch import Tensor

from shoal.config.recipe import LocalSGD as LocalSGDSection
from shoal.config.recipe import SyncSection
from shoal.sync.every_step import EveryStep
from shoal.sync.local_sgd import LocalSGD
from shoal.sync.policy import Division, Policy

KEEPS_EQUAL_STATE = frozenset({"every-step"})
"""Policies under which all replicas have the same optimizer state."""


def create(section: SyncSection, *, division: Division, values: Tensor, steps: int) -> Policy:
    """The policy of a recipe's section. `values`: flat parameters; `steps`: of the whole run."""
    if isinstance(section, LocalSGDSection):
        return LocalSGD(division, values=values, every_steps=section.every_steps, steps=steps)
    return EveryStep(division, bucket_bytes=section.bucket_bytes)
