"""What cannot run is refused before a worker starts, with the reason and what can run instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shoal.config.contradictions import contradictions
from shoal.config.recipe import ObserveSection, Recipe
from shoal.engine.decision import given_layout
from shoal.engine.job import Inputs
from shoal.errors import ConfigError, ModelError, UserError
from shoal.launch.object_store import problem_of
from shoal.layout import Layout
from shoal.legal import Combination, facts_from_config, problems
from shoal.plan.from_recipe import config_of
from shoal.tasks.kinds import create, kind_of


def combination_of(recipe: Recipe, layout: Layout) -> Combination:
    """What `recipe` asks for together, without its model (legal/rules.py judges it)."""
    micro = recipe.train.micro_batch_samples
    return Combination(
        layout=layout,
        policy=recipe.sync.kind,
        codec=recipe.sync.codec.kind,
        fragments=getattr(recipe.sync, "fragments", 1),
        workers=recipe.launch.workers,
        elastic=recipe.parallel.fewest_replicas is not None,
        shard_level=recipe.parallel.sharding.level,
        context_kind=recipe.parallel.rows.kind,
        offload=recipe.parallel.sharding.offload,
        recompute=recipe.parallel.recompute,
        compile=recipe.parallel.compile,
        schedule=recipe.parallel.pipelining.schedule,
        stages_per_rank=recipe.parallel.pipelining.stages,
        split=tuple(recipe.parallel.pipelining.split or ()),
        runs_once=kind_of(recipe.task.kind).runs_once,
        sequence_tokens=recipe.data.sequence_tokens,
        global_batch_samples=recipe.train.global_batch_samples,
        micro_batch_samples=None if micro == "auto" else micro,
        exact=recipe.train.exact,
        grid_group=_grid_group(recipe),
        optimizer=recipe.train.optimizer.kind,
        dropout=recipe.model.dropout,
        balance=recipe.model.balance,
        whole_logits=kind_of(recipe.task.kind).whole_logits,
        token_losses=kind_of(recipe.task.kind).token_losses,
        shares=getattr(recipe.sync, "shares", "equal"),
    )


def _grid_group(recipe: Recipe) -> int | None:
    section = recipe.train.quantise
    return None if section is None else section.group or 0


def check(recipe: Recipe) -> Layout:
    """Refuse what cannot run, before anything is fetched or started. Raises ConfigError."""
    stored = problem_of(recipe.checkpoint.where)
    if found := [*contradictions(recipe), *([] if stored is None else [stored])]:
        raise ConfigError(found)
    layout = given_layout(recipe)
    refuse(combination_of(recipe, layout))
    return layout


def check_trackers(section: ObserveSection) -> None:
    """Refuse, before anything is begun, a tracker that could not be written to. Raises UserError.

    No network is used: whether a key is valid is told when workers start.
    """
    for name, wanted in (("tensorboard", section.tensorboard), ("wandb", section.wandb)):
        if wanted and find_spec(name) is None:
            raise UserError(
                f"observe.{name}: the package is not installed; pip install {name}, or set "
                f"observe.{name}=false"
            )
    if section.wandb:
        _check_wandb()


def _check_wandb() -> None:
    import wandb

    if wandb.setup().settings.mode in ("offline", "disabled", "dryrun"):
        return
    try:
        known = wandb.login(prompt=False, verify=False)
    except TypeError:  # an older one, which cannot be asked without a prompt
        return
    except wandb.errors.Error as error:
        raise UserError(f"observe.wandb: {error}") from None
    if not known:
        raise UserError(
            "observe.wandb: no API key was found; log in with `wandb login`, set WANDB_API_KEY, "
            "set WANDB_MODE=offline to keep everything in RUN/wandb, or set observe.wandb=false"
        )


def refuse_illegal(recipe: Recipe, layout: Layout, *, config: Mapping[str, Any]) -> None:
    """Refuse what this model cannot be cut along, before a worker starts. Raises ConfigError.

    A family that nobody has a table of can be replicated and sharded.
    """
    asked = combination_of(recipe, layout)
    try:
        asked = asked.of_model(facts_from_config(config))
    except ModelError:
        asked = replace(asked, family=str(config.get("model_type")))
    refuse(asked)


def refuse(asked: Combination) -> None:
    """Raises ConfigError for what is not legal together."""
    found = problems(asked)
    if found:
        raise ConfigError(found)


def trained_config(recipe: Recipe, *, inputs: Inputs) -> Mapping[str, Any]:
    """The keys of config.json of the model that is trained."""
    task = create(recipe.task.kind, settings=inputs.task_settings)
    return config_of(
        recipe,
        folder=Path(inputs.model_directory) if inputs.model_directory else None,
        vocabulary_size=inputs.vocabulary_size,
        task=task.config_keys(),
    )
