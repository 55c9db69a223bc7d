"""Keys of different sections that cannot mean anything together."""

from __future__ import annotations

from collections.abc import Iterator

from shoal.config.recipe import Recipe
from shoal.errors import Problem


def contradictions(recipe: Recipe) -> Iterator[Problem]:
    """What a recipe asks for that another of its keys rules out."""
    until, checkpoint = recipe.train.until, recipe.checkpoint
    if until is not None and until.evaluation_loss is None and until.patience is None:
        what = "expected evaluation_loss, patience or both; got neither"
        yield Problem("train.until", what, "set one, or train.until=null")
    hint = "set train.evaluate_every_steps above 0"
    if until is not None and not recipe.train.evaluate_every_steps:
        yield Problem("train.until", "is judged at evaluations, and there are none", hint)
    if checkpoint.model == "best" and not recipe.train.evaluate_every_steps:
        yield Problem("checkpoint.model", "best is judged at evaluations, and there are none", hint)
    if checkpoint.model == "best" and not checkpoint.keep_best:
        yield Problem("checkpoint.model", "best needs its save", "set checkpoint.keep_best=true")
