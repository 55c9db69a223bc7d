"""The transformers configuration of a run's model, from its recipe, its data and its task."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import nn

from shoal.config.recipe import ConfiguredModel, Recipe
from shoal.engine.prepare import Inputs
from shoal.errors import ModelError
from shoal.legal import shrunk
from shoal.models import init
from shoal.models.dropout import apply_keyed
from shoal.models.huggingface import build_meta, config_from, read_config
from shoal.tasks.task import Task


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


def small_model(config: Any, recipe: Recipe, *, auto_class: str) -> nn.Module:
    """A real model of the same kind as `config`'s, of few layers and little width, for probes.

    The configuration's own sizes where no rule makes them smaller.
    """
    tree = config.to_dict()
    with suppress(ModelError):
        tree |= shrunk(tree)
    small = config_from(tree)
    small.use_cache = False
    model = build_meta(small, auto_class=auto_class, dropout=recipe.model.dropout)
    init.materialise(model, record=init.record(model), seed=recipe.seed)
    if recipe.model.dropout == "keyed":
        apply_keyed(model, seed=recipe.seed, asked=small)
    return model
