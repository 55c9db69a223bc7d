"""Where a run's batches come from: stored samples, or what its task plays. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from shoal.config.recipe import Recipe
from shoal.data.stream import Stream
from shoal.engine.job import Inputs
from shoal.tasks.kinds import create
from shoal.tasks.playing import Batches, Play
from shoal.tasks.task import Task


def batches_of(
    recipe: Recipe, inputs: Inputs, *, task: Task | None = None, play: Play | None = None
) -> Batches:
    """The batches of a run; without `play` only their order, for who asks how long it is."""
    task = task or create(recipe.task.kind, settings=inputs.task_settings, options=recipe.task)
    samples = recipe.train.global_batch_samples // task.rows_per_sample
    data = Path(inputs.data_directory)
    stored = Stream(data, seed=recipe.seed, global_batch_samples=samples)
    return task.batches(stored, play=play)
