"""What completes prompts for a task that learns from it: launch lends a room of this layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from shoal.engine.folded import folded_weights
from shoal.engine.job import Job
from shoal.engine.state import FlatState
from shoal.errors import ModelError
from shoal.models.stored import InMemory, Weights
from shoal.observe.events import Report
from shoal.parallel.replica import Replica
from shoal.runtime import WorkerInfo
from shoal.tasks.playing import Writes
from shoal.tasks.task import Task


class MakesWrites(Protocol):
    """Makes what completes prompts by `weights` as they are. Raises ModelError where it cannot."""

    def __call__(
        self, config: Any, *, auto_class: str, weights: Callable[[], Weights]
    ) -> Writes: ...


def writes_for(
    job: Job,
    make: MakesWrites | None,
    replica: Replica,
    task: Task,
    state: FlatState,
    worker: WorkerInfo,
    report: Report,
) -> Writes | None:
    """What completes prompts here; None where whole rows are computed. `report` is told which."""
    if make is None or not task.plays or task.auto_class != "AutoModelForCausalLM":
        return None
    found, words = None, _hindrance(job, replica=replica, device=worker.device)
    config = replica.model.config

    def weights() -> Weights:
        trained = InMemory(state.named("parameter"))
        folded = folded_weights(job.recipe, job.inputs, trained, task=task, config=config)
        return trained if folded is None else folded

    if words is None:
        try:
            found = make(config, auto_class=task.auto_class, weights=weights)
            words = found.words
        except ModelError as error:
            words = str(error)
    if worker.rank == 0:
        how = "by the engine of serving" if found else "whole rows for each token"
        report.say("event", name="completions", fields={"text": f"{how}: {words}"})
    return found


def _hindrance(job: Job, *, replica: Replica, device: torch.device) -> str | None:
    """Why the engine of serving cannot stand in for this replica's own forward.

    That is in float32 too when it asks for logits, whatever format training computes in.
    """
    if replica.is_cut:
        return "a replica is cut over several workers"
    if job.double:
        return "the run computes in float64"
    if device.type != "cpu":
        return "it is for CPUs"
    if job.recipe.train.quantise is not None:
        return "train.quantise computes with rounded weights"
    return None
