"""Keeps parameters and gradients of every step as boxes, for proofs that compare two layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from shoal.checkpoint.store import Store
from shoal.comm.messages import gather_json
from shoal.engine.digest import hash_of
from shoal.engine.saving import save
from shoal.sync.every_step import Reduced

if TYPE_CHECKING:
    from shoal.engine.build import Training

FOLDER = "recorded"
"""Below the run directory: one checkpoint per step, of kinds `parameter` and `gradient`."""


class Recorder:
    """Writes RUN/recorded/step-N: parameters before step N (from 0), and its summed gradients."""

    def __init__(self, run: Path, training: Training) -> None:
        self._store, self._training = Store(run / FOLDER), training

    @torch.no_grad()
    def note(self, step: int, reduced: Reduced, norm: float) -> None:
        """Keep one step. Collective over all ranks."""
        training = self._training
        state, world = training.state, training.ranks.world
        whole = reduced.values
        if world.computes_in_place:  # each thread has its slice of the sum
            whole = torch.zeros(state.trainable_numel, dtype=whole.dtype)
            whole[reduced.span.start : reduced.span.stop] = reduced.values
            world.sum_(whole)
        facts = {
            "norm": norm,
            "gradient_digests": gather_json(world, f"{hash_of(whole):016x}"),
            "places": training.ranks.cut.workers,
            "cut": sorted(state.cut_names),
            "ties": [list(names) for names in training.anatomy.ties],
        }
        kept = replace(state, moments={"gradient": whole})
        save(self._store, kept, group=world, step=step, facts=facts, keep=1 << 30)
