"""What cannot run is refused before a worker starts, with the reason and what can run instead."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.config.recipe import Recipe
from shoal.engine.decision import divisible, given_layout
from shoal.engine.prepare import Inputs
from shoal.errors import ConfigError, ModelError, Problem
from shoal.layout import Layout
from shoal.legal import facts_from_config, not_yet
from shoal.legal import problems as legal_problems
from shoal.plan.ask import config_of
from shoal.tasks.kinds import create


def check(recipe: Recipe) -> Layout:
    """Refuse what cannot run, before anything is fetched or started. Raises ConfigError."""
    layout = given_layout(recipe)
    problems = list(not_yet(layout, policy=recipe.sync.kind, codec=recipe.sync.codec.kind))
    problems += divisible(recipe, layout)
    problems += cut_problems(recipe, layout)
    if recipe.launch.workers == "threads":
        if recipe.parallel.fewest_replicas is not None:
            what = "threads of one process live and die together: their degree cannot shrink"
            hint = "use launch.workers=processes, or a fixed degree"
            problems.append(Problem("parallel.replicate", what, hint))
        if recipe.model.dropout == "framework":
            hint = "use model.dropout=keyed, or launch.workers=processes"
            problems.append(
                Problem("model.dropout", "framework dropout is refused with threads", hint)
            )
    if problems:
        raise ConfigError(problems)
    return layout


def cut_problems(recipe: Recipe, layout: Layout) -> list[Problem]:
    """What a replica of several workers cannot do, whatever its model."""
    if layout.replica_workers == 1:
        return []
    found = []
    if recipe.train.exact:
        what = f"holds for whole replicas only, got {layout}"
        hint = "set it to false, or use parallel.replicate alone"
        found.append(Problem("train.exact", what, hint))
    if recipe.train.optimizer.kind == "muon":
        what = f"muon needs whole matrices, got {layout}"
        hint = "use adamw, or parallel.replicate alone"
        found.append(Problem("train.optimizer.kind", what, hint))
    if recipe.model.dropout == "framework" and layout.tensor > 1:
        what = "framework dropout differs between the ranks of the tensor axis"
        found.append(Problem("model.dropout", what, "use keyed or off"))
    if recipe.launch.workers == "threads":
        what = f"threads carry the replicate axis only, got {layout}"
        found.append(Problem("launch.workers", what, "use processes"))
    return found


def refuse_illegal(recipe: Recipe, layout: Layout, *, config: Mapping[str, Any]) -> None:
    """Refuse what this model cannot be cut along, before a worker starts. Raises ConfigError.

    A family that nobody has a table of can be replicated and sharded.
    """
    if layout.replica_workers == 1:
        return
    try:
        facts = facts_from_config(config)
    except ModelError:
        problems = [
            Problem(
                f"parallel.{axis}",
                f"shoal has no table for the family {config.get('model_type')}, so such a model "
                f"cannot be cut along {axis}, got {layout.degree(axis)}",
                f"set it to 1 and use shard={layout.degree(axis)} instead, which takes any family",
            )
            for axis in ("tensor", "context", "pipeline", "expert")
            if layout.degree(axis) > 1
        ]
    else:
        problems = not_yet(layout, family=facts.family) or legal_problems(
            facts,
            layout,
            policy=recipe.sync.kind,
            codec=recipe.sync.codec.kind,
            workers=recipe.launch.workers,
            shard_level=recipe.parallel.sharding.level,
            recompute=recipe.parallel.recompute,
            sequence_tokens=recipe.data.sequence_tokens,
        )
    if problems:
        raise ConfigError(problems)


def trained_config(recipe: Recipe, *, inputs: Inputs) -> Mapping[str, Any]:
    """The keys of config.json of the model that is trained."""
    task = create(recipe.task.kind, settings=inputs.task_settings)
    return config_of(
        recipe,
        folder=Path(inputs.model_directory) if inputs.model_directory else None,
        vocabulary_size=inputs.vocabulary_size,
        task=task.config_keys(),
    )
