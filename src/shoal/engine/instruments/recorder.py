"""Keeps parameters and gradients of every step as boxes, for proofs that compare two layouts."""

from __future__ import annotations

from dataclasses import replace

import torch

from shoal.checkpoint.store import Store
from shoal.comm.flat import Vector
from shoal.comm.messages import gather_json
from shoal.engine.membership.digest import hash_of
from shoal.engine.saving.saver import Saver
from shoal.engine.state import TRAINABLE
from shoal.engine.training import Training
from shoal.observe.events import Report
from shoal.sync.policy import Reduced

FOLDER = "recorded"
"""Below the run directory: one checkpoint per step, of kinds `parameter` and `gradient`."""


def attach(training: Training, report: Report) -> None:
    """Record every step of `training`."""
    training.update.on_reduced = Recorder(training).note


class Recorder:
    """Writes RUN/recorded/step-N: parameters before step N (from 0), and its summed gradients."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._saver = Saver(Store(training.job.run / FOLDER), keep=1 << 30)

    @torch.no_grad()
    def note(self, step: int, reduced: Reduced, norm: float) -> None:
        """Keep one step. Collective over all ranks."""
        training = self._training
        state, ranks = training.state, training.ranks
        whole = reduced.values
        if reduced.group is not None:  # each thread has its slice of the sum
            whole = torch.zeros(state.trainable_numel, dtype=whole.dtype)
            whole[reduced.span.start : reduced.span.stop] = reduced.values
            reduced.group.sum_(whole)
        facts = {
            "norm": norm,
            "gradient_digests": gather_json(ranks.world, f"{hash_of(whole):016x}"),
            "replica_workers": ranks.layout.replica_workers,
            "partial": sorted(n for n, each in state.holdings.items() if each.partial),
            "ties": [list(names) for names in training.anatomy.ties],
        }
        gradient = Vector("gradient", whole, TRAINABLE)
        parameter = state.vectors["parameter"]
        kept = replace(state, vectors={each.kind: each for each in (parameter, gradient)})
        self._saver.save(
            kept,
            group=ranks.world,
            layout=ranks.layout,
            step=step,
            facts=lambda: facts,
            last=True,
        )
