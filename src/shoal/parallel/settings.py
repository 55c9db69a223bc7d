"""How the strategies behave, beside the degrees of the layout."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """One value per strategy that has a choice."""

    shard_level: str = "parameters"
    context_kind: str = "ring"
    recompute: str = "none"
    compile: bool = False
    offload: bool = False
    """Parameters, gradients and optimizer state live in CPU memory (with shard above 1)."""
    schedule: str = "1f1b"
    """In which order a pipeline's stages compute (plan/schedules.py)."""
    stages_per_rank: int = 1
    split: tuple[int, ...] = ()
    """Blocks of each stage; empty: by cost."""
