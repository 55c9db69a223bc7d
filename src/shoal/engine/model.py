"""The transformers configuration of a run's model, from its recipe, its data and its task."""

from __future__ import annotations

from typing import Any

from shoal.config.recipe import ConfiguredModel, Recipe
from shoal.engine.prepare import Inputs
from shoal.models.huggingface import read_config
from shoal.tasks.outcome import Task


def model_config(recipe: Recipe, *, inputs: Inputs, task: Task) -> Any:
    """The configuration. Raises ModelError for keys or values that its class does not take."""
    chosen = recipe.model
    if isinstance(chosen, ConfiguredModel):
        size = chosen.settings.get("vocab_size") or inputs.vocabulary_size
        settings = {**chosen.settings, **task.model_settings()}
        return read_config(
            architecture=chosen.architecture, settings=settings, vocabulary_size=size
        )
    return read_config(
        architecture=None, settings=task.model_settings(), path=inputs.model_directory
    )
