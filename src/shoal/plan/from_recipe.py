"""What a recipe asks to be planned: its model's sizes, its step, and the choices it has made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.config.recipe import ConfiguredModel, Recipe
from shoal.errors import UserError
from shoal.layout import Layout
from shoal.legal import facts_from_config
from shoal.plan.search import Space
from shoal.plan.workload import DEGREES, Workload

_BASE_BYTES = {"float32": None, "int8": 1.0, "nf4": 0.5 + 4 / 64}
"""An element of frozen matrices beside adapters, by model.adapter.base; None: a float's."""


def read_config(path: Path) -> Mapping[str, Any]:
    """A config.json; raises UserError for what is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read as a config.json ({error}). Give the file of the model, or "
            "the folder that holds it as model.path."
        ) from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object of model settings")
    return data


def config_of(
    recipe: Recipe,
    *,
    folder: Path | None = None,
    vocabulary_size: int | None = None,
    task: Mapping[str, Any] = {},
) -> Mapping[str, Any]:
    """The keys of config.json of a recipe's model.

    `folder` holds a pretrained model; `vocabulary_size` is that of the tokenizer where the recipe
    leaves it open; `task` has the keys that the task gives (`Task.config_keys`).
    """
    model = recipe.model
    if isinstance(model, ConfiguredModel):
        vocabulary = vocabulary_size or recipe.data.tokenizer.vocabulary_size
        config = {"vocab_size": vocabulary, **model.settings, "model_type": model.architecture}
    else:
        config = {**read_config((folder or Path(model.path)) / "config.json")}
    return {**config, **task}


def workload_of(recipe: Recipe, *, config: Mapping[str, Any], precision: str) -> Workload:
    """The optimizer step of a recipe. Raises ModelError for a family that is not known."""
    facts, adapter = facts_from_config(config), recipe.model.adapter
    return Workload(
        facts=facts,
        sequence_tokens=facts.fixed_tokens or recipe.data.sequence_tokens,
        global_batch_samples=recipe.train.global_batch_samples,
        precision=precision,
        trainable="all" if adapter is None else "adapters",
        base_bytes=_BASE_BYTES[adapter.base]
        if adapter is not None and adapter.targets == ("all-linear",)
        else None,
    )


def choices_of(recipe: Recipe, *, layout: Layout, only_replicate: bool = False) -> Space:
    """The search space that a recipe leaves: what it gives is fixed, to the degrees of `layout`.

    With `only_replicate` the axes that it does not give stay as in `layout`, replicate excepted.
    """
    adapter = recipe.model.adapter
    fixed: dict[str, object] = {}
    for axis in DEGREES:
        is_open = only_replicate is False or axis == "replicate"
        if getattr(recipe.parallel, axis) is not None or not is_open:
            fixed[axis] = layout.degree(axis)
        elif axis != "replicate" and adapter is not None and adapter.base != "float32":
            fixed[axis] = 1  # whole matrices in each replica
    if recipe.parallel.pipeline is not None and layout.pipeline > 1:
        given = recipe.parallel.pipelining
        fixed |= {"schedule": given.schedule, "chunks": given.stages}
    if recipe.train.micro_batch_samples != "auto":
        fixed["micro_batch_samples"] = recipe.train.micro_batch_samples
    return Space(fixed=fixed)
