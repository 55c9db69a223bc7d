"""What a proof trains instead of the user's run: the same model made small, for a few steps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shoal.config.anchor import anchored
from shoal.config.recipe import ConfiguredModel, Recipe
from shoal.engine.decision import Decision, format_of, given_layout
from shoal.engine.job import Inputs
from shoal.errors import ConfigError, ModelError, Problem
from shoal.launch.refuse import check, refuse_illegal, trained_config
from shoal.layout import Layout
from shoal.legal import shrunk

_SAMPLES = 2
"""Samples that each reader computes in a step, one after the other: gradients are accumulated. Of
a pipeline as many for each of its ranks, so that it is filled, or as many as the recipe says."""
_MOST = 4
"""Micro batches for each rank of a pipeline, where the recipe says more."""


def proof_layout(recipe: Recipe) -> Layout:
    """The layout to prove. Raises ConfigError for one worker, and for what `check` refuses."""
    layout = given_layout(recipe)
    if layout.workers == 1:
        hint = "name one, such as parallel.replicate=2, parallel.shard=2 or parallel.tensor=2"
        raise ConfigError([Problem("parallel", "one worker is its own proof", hint)])
    if recipe.model.dropout == "framework":
        what = "framework dropout draws other numbers in every layout, so no two runs are equal"
        raise ConfigError([Problem("model.dropout", what, "use keyed or off")])
    check(recipe)
    return layout


def proof_recipe(
    recipe: Recipe,
    *,
    inputs: Inputs,
    layout: Layout,
    steps: int,
    whole: bool,
    num_devices: int = 0,
    samples: int | None = None,
) -> Recipe:
    """The recipe of the proof's runs: the task, data and optimizer of the user's.

    The model is made small (unless `whole`), drawn even where the recipe reads weights; the rate is
    constant, so that the first steps move the weights; a step has few samples (`samples`).
    Raises ConfigError when the model cannot be cut so, ModelError when no rule makes it small.
    """
    config = trained_config(recipe, inputs=inputs)
    refuse_illegal(recipe, layout, config=config)
    if recipe.model.balance == "batch" and config.get("output_router_logits"):
        what = (
            "the balance loss of a micro batch depends on which rows it has, and so on the layout"
        )
        raise ConfigError([Problem("model.balance", what, "set it to sequence, or off")])
    tree = recipe.model_dump(mode="json")
    if not whole:
        tree["model"] = _small(recipe, config, inputs=inputs, layout=layout)
        if not isinstance(recipe.model, ConfiguredModel) and inputs.tokenizer_directory is not None:
            tree["data"]["tokenizer"] = {"kind": "folder", "path": inputs.tokenizer_directory}
    samples = samples or _micro_batches(recipe, layout) * layout.replicate * layout.shard
    compute = recipe.precision.compute
    tree["train"] |= {
        "steps": steps,
        "epochs": None,
        "stop_after_steps": None,
        "evaluate_every_steps": 0,
        "global_batch_samples": samples,
        "micro_batch_samples": 1,
        "schedule": {"kind": "constant"},
        "max_gradient_norm": recipe.train.max_gradient_norm or 1.0,
    }
    tree["checkpoint"] = {"every_steps": max(1, steps // 2), "keep": 3, "background": False}
    tree["precision"] = {"compute": "float32" if compute == "auto" else compute}
    tree["sync"] |= {"verify_every_steps": 0}
    tree["observe"] = {"console": False}
    if recipe.launch.device == "auto":  # workers may share a GPU
        tree["launch"]["device"] = "cuda" if num_devices else "cpu"
    return anchored(Recipe.model_validate(tree))


def _micro_batches(recipe: Recipe, layout: Layout) -> int:
    """How many of one sample each reader computes: a pipeline's order of work depends on it."""
    usual, micro = _SAMPLES * layout.pipeline, recipe.train.micro_batch_samples
    if layout.pipeline == 1 or micro == "auto":
        return usual
    given = recipe.train.global_batch_samples // (layout.replicate * layout.shard * micro)
    return max(1, min(given, _MOST * layout.pipeline))


def proof_decision(recipe: Recipe, layout: Layout, *, micro: int = 1) -> Decision:
    """How one of the runs is done: threads only where the recipe says so, one core each."""
    compute = recipe.precision.compute
    threads = recipe.launch.workers == "threads" and layout.workers > 1
    return Decision(
        layout,
        "threads" if threads else "processes",
        1,
        micro,
        format_of(compute),
        "a proof",
    )


def with_layout(recipe: Recipe, layout: Layout) -> Recipe:
    """The same recipe on one worker, when `layout` is that; else as it is."""
    if layout.workers > 1:
        return recipe
    tree = recipe.model_dump(mode="json")
    tree["parallel"] = {"replicate": 1}
    tree["launch"] |= {"workers": "processes"}
    return Recipe.model_validate(tree)


def _adapter(recipe: Recipe, *, inputs: Inputs) -> dict[str, Any] | None:
    """The adapter of a small model: beside the same layers, of whatever blocks there are."""
    from shoal.engine.folded import adapter_settings

    found = adapter_settings(recipe, inputs=inputs)
    if found is None:
        return None
    targets = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", each) for each in found.targets)
    about = {"kind": found.kind, "rank": found.rank, "alpha": found.scale * found.rank}
    return {**about, "targets": list(targets), "dropout": found.dropout}


def _small(
    recipe: Recipe, config: Mapping[str, Any], *, inputs: Inputs, layout: Layout
) -> dict[str, Any]:
    """The model section of a small model of the same kind."""
    from shoal.models.huggingface import known_settings, read_config
    from shoal.models.small import small_configs

    model = recipe.model
    if isinstance(model, ConfiguredModel):
        size = model.settings.get("vocab_size") or inputs.vocabulary_size
        full = read_config(
            architecture=model.architecture, settings=model.settings, vocabulary_size=size
        )
        kept = model.settings
    else:
        full, kept = read_config(path=inputs.model_directory), dict(config)
        known = known_settings(full.model_type)
        dropped = {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version"}
        kept = {k: v for k, v in kept.items() if k in known and k not in dropped and k[0] != "_"}
        kept = {k: v for k, v in kept.items() if k not in ("num_labels", "id2label", "label2id")}
    tree = full.to_dict()
    try:
        given = recipe.parallel.pipelining
        blocks = sum(given.split or ()) or layout.pipeline * given.stages
        by_heads = layout.context if recipe.parallel.rows.kind == "ulysses" else 1
        small = shrunk(tree, tensor=layout.tensor * by_heads, pipeline=blocks, expert=layout.expert)
    except ModelError:  # sizes of other names, an encoder's and a decoder's
        found, known = next(small_configs(full)).to_dict(), known_settings(full.model_type)
        small = {key: found[key] for key in known & found.keys() if found[key] != tree.get(key)}
    architecture = full.model_type
    settings = {**kept, **small}
    if getattr(full, "vocab_size", None):
        settings["vocab_size"] = full.vocab_size
    return {
        **settings,  # a configuration may have keys of these names too, such as Whisper's dropout
        "kind": "config",
        "architecture": architecture,
        "dropout": model.dropout,
        "balance": model.balance,
        "adapter": _adapter(recipe, inputs=inputs),
    }
