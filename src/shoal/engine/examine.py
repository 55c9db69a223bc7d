"""A lone worker that knows transformers: a recipe's keys, and its model (parallel/oracle.py)."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch

from shoal.config.recipe import ConfiguredModel, Recipe
from shoal.engine.build import model_settings
from shoal.engine.job import Inputs
from shoal.engine.worker import report_failure
from shoal.models.adapter_files import AdapterFolder
from shoal.models.huggingface import refuse_unknown
from shoal.observe.events import Report
from shoal.parallel.model import ModelSettings
from shoal.parallel.oracle import Verdict, examine
from shoal.parallel.replica import build_replica
from shoal.runtime import WorkerInfo, start_worker
from shoal.tasks.kinds import create


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of a worker that reports what `check_keys` and `verdict_of` (with inputs) say."""
    report = Report(descriptor)
    try:
        start_worker(WorkerInfo(0, 1, torch.device("cpu"), payload["threads"]), seed=0)
        recipe = Recipe.model_validate(payload["recipe"])
        check_keys(recipe)
        inputs = payload["inputs"]
        found = verdict_of(recipe, inputs=Inputs.from_json(inputs)).to_json() if inputs else {}
        report.say("measured", **found)
    except BaseException as error:
        return report_failure(error, report=report, rank=0)
    return 0


def check_keys(recipe: Recipe) -> None:
    """Raise ModelError for an architecture, or keys of it, that transformers does not know."""
    if isinstance(recipe.model, ConfiguredModel):
        refuse_unknown(recipe.model.architecture, recipe.model.settings)


def verdict_of(recipe: Recipe, *, inputs: Inputs) -> Verdict:
    """Whether the recipe's model computes what transformers' does. Raises ModelError."""
    task = create(recipe.task.kind, settings=inputs.task_settings, options=recipe.task)
    settings = model_settings(recipe, inputs=inputs, task=task)
    with warnings.catch_warnings():  # of the small model; a run says them of its own
        warnings.simplefilter("ignore")
        _check_adapter(settings, inputs=inputs)
        return examine(
            replace(settings, freeze=(), grid=None),
            task=task.examined(),
            packing=recipe.data.packing,
            sequence_tokens=recipe.data.sequence_tokens,
            is_drawn=isinstance(recipe.model, ConfiguredModel),
        )


def _check_adapter(settings: ModelSettings, *, inputs: Inputs) -> None:
    """Raise ConfigError or ModelError for targets that are no layers of the model."""
    if settings.adapter is None:
        return
    model = build_replica(replace(settings, freeze=())).model
    if inputs.adapter_directory is not None:
        AdapterFolder(inputs.adapter_directory).check(model)
