"""Holds a recipe's model against transformers before workers start, once for each configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import xxhash

from shoal.config.recipe import Recipe
from shoal.engine.job import Inputs
from shoal.environment import cache_directory, usable_cores
from shoal.errors import ModelError
from shoal.launch.directory import write_whole
from shoal.launch.measuring import measuring_job, wait_for_imports
from shoal.launch.pool import WorkerPool
from shoal.launch.refuse import trained_config
from shoal.observe.console import Console

_FORMAT = 2
"""Counts up when what is examined changes."""


def refuse_wrong_model(
    recipe: Recipe, *, inputs: Inputs, pool: WorkerPool, console: Console
) -> None:
    """Raise ModelError for a model that does not compute what transformers' does."""

    def ask() -> dict[str, Any]:
        wait_for_imports(pool, console=console)
        console.phase("holding the model against transformers")
        payload = {
            "recipe": recipe.model_dump(mode="json"),
            "inputs": inputs.to_json(),
            "threads": usable_cores(),
        }
        return measuring_job("shoal.engine.examine:run", payload, pool=pool, console=console)

    refuse_by(ask, recipe, inputs=inputs)


def refuse_by(ask: Callable[[], dict[str, Any]], recipe: Recipe, *, inputs: Inputs) -> None:
    """The same by the verdict that `ask` gives; a good one is asked for only once. ModelError."""
    config = trained_config(recipe, inputs=inputs)
    depends_on = {
        "format": _FORMAT,
        "versions": [version("torch"), version("transformers")],
        "config": config,
        "model": inputs.content.get("model"),
        "task": recipe.task.kind,
        "dropout": recipe.model.dropout,
        "packing": recipe.data.packing,
        "sequence_tokens": recipe.data.sequence_tokens,
    }
    key = xxhash.xxh3_64_hexdigest(json.dumps(depends_on, sort_keys=True, default=str).encode())
    path = cache_directory() / "examined" / f"{config.get('model_type')}-{key}"
    if path.is_file():
        return
    verdict = ask()
    if verdict["problems"]:
        what = "; ".join(verdict["problems"])
        raise ModelError(f"a {config.get('model_type')} for {recipe.task.kind}: {what}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"{verdict['difference']:.1e} from transformers\n")
