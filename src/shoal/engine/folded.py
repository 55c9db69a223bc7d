"""The whole model that a run's adapters come to, and how they were attached."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal.config.recipe import Recipe
from shoal.engine.job import Inputs
from shoal.models.adapter import AdapterSettings, Folded
from shoal.models.adapter_files import AdapterFolder
from shoal.models.huggingface import build_meta
from shoal.models.pretrained import PretrainedWeights
from shoal.models.stored import Weights
from shoal.tasks.task import Task


def adapter_settings(recipe: Recipe, *, inputs: Inputs) -> AdapterSettings | None:
    """The adapter that is trained, if any, as the recipe or its own folder says. ModelError."""
    section = recipe.model.adapter
    if section is None:
        return None
    if inputs.adapter_directory is not None:
        return replace(AdapterFolder(inputs.adapter_directory).settings, base=section.base)
    return AdapterSettings(
        section.kind, section.rank, section.scale, section.targets, section.dropout, section.base
    )


def folded_weights(
    recipe: Recipe, inputs: Inputs, trained: Weights, *, task: Task, config: Any
) -> Folded | None:
    """The whole model that adapters come to; None without. ModelError for another base folder."""
    settings = adapter_settings(recipe, inputs=inputs)
    if settings is None:
        return None
    model = build_meta(config, auto_class=task.auto_class, dropout="off")
    folder = inputs.model_directory
    base = None if folder is None else PretrainedWeights(folder, model=model)
    return Folded(trained, base=base, model=model, settings=settings)
