"""Holds a recipe's model against transformers before workers start, once for each configuration.

Its keys while the data is prepared, which may take hours; all of it once the data is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from shoal.config.recipe import ConfiguredModel, Recipe
from shoal.engine.job import Inputs
from shoal.environment import cache_directory, usable_cores
from shoal.errors import ModelError
from shoal.launch.directory import write_whole
from shoal.launch.measuring import is_ready, measuring_job, wait_for_imports
from shoal.launch.pool import WorkerPool
from shoal.launch.refuse import trained_config
from shoal.observe.console import Console
from shoal.tasks.kinds import code_of

_FORMAT = 3
"""Counts up when what is examined changes."""


def keys_are_known(recipe: Recipe, *, pool: WorkerPool, console: Console) -> bool:
    """Whether transformers knows the model's architecture and keys; False: not to be told yet.

    The fork server still imports then. Raises ModelError for what is not known, as the verdict on
    the model does later.
    """
    model = recipe.model
    if isinstance(model, ConfiguredModel):
        if not is_ready(pool):
            return False
        path = _kept("keys", [version("transformers"), model.architecture, *sorted(model.settings)])
        if not path.is_file():
            _examined(recipe, None, threads=1, pool=pool, console=console)
            _keep(path, "known\n")
    return True


def _examined(
    recipe: Recipe, inputs: Inputs | None, *, threads: int, pool: WorkerPool, console: Console
) -> dict[str, Any]:
    """What a worker finds of the model; without `inputs`, of its keys only. Raises ModelError."""
    given = None if inputs is None else inputs.to_json()
    payload = {"recipe": recipe.model_dump(mode="json"), "inputs": given, "threads": threads}
    return measuring_job("shoal.engine.examine:run", payload, pool=pool, console=console)


def _kept(name: str, depends_on: Any) -> Path:
    """The file that stands for a good verdict."""
    key = xxhash.xxh3_64_hexdigest(json.dumps(depends_on, sort_keys=True, default=str).encode())
    return cache_directory() / "examined" / f"{name}-{key}"


def _keep(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def refuse_wrong_model(
    recipe: Recipe, *, inputs: Inputs, pool: WorkerPool, console: Console
) -> None:
    """Raise ModelError for a model that does not compute what transformers' does."""

    def ask() -> dict[str, Any]:
        wait_for_imports(pool, console=console)
        console.phase("holding the model against transformers")
        return _examined(recipe, inputs, threads=usable_cores(), pool=pool, console=console)

    refuse_by(ask, recipe, inputs=inputs)


def refuse_by(ask: Callable[[], dict[str, Any]], recipe: Recipe, *, inputs: Inputs) -> None:
    """The same by the verdict that `ask` gives; a good one is asked for only once. ModelError."""
    config, adapter = trained_config(recipe, inputs=inputs), recipe.model.adapter
    depends_on = {
        "format": _FORMAT,
        "versions": [version("torch"), version("transformers")],
        "config": config,
        "model": inputs.content.get("model"),
        "task": code_of(recipe.task.kind),
        "dropout": recipe.model.dropout,
        "adapter": None if adapter is None else [adapter.targets, inputs.content.get("adapter")],
        "packing": recipe.data.packing,
        "sequence_tokens": recipe.data.sequence_tokens,
    }
    path = _kept(str(config.get("model_type")), depends_on)
    if path.is_file():
        return
    verdict = ask()
    if verdict["problems"]:
        what = "; ".join(verdict["problems"])
        raise ModelError(f"a {config.get('model_type')} for {recipe.task.kind}: {what}")
    _keep(path, f"{verdict['difference']:.1e} from transformers\n")
