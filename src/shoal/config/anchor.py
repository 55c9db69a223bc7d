"""Local paths of a recipe made absolute, so that its run can be resumed from any folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal.config.recipe import PretrainedModel, Recipe


def anchored(recipe: Recipe) -> Recipe:
    """`recipe` with every path that leads somewhere from here made absolute; names stay names."""
    data = recipe.data
    source: Any = data.source
    if isinstance(source, str):
        source = _absolute(source)
    else:
        source = tuple(s.model_copy(update={"source": _absolute(s.source)}) for s in source)
    tokenizer = data.tokenizer
    if tokenizer.path is not None:
        tokenizer = tokenizer.model_copy(update={"path": _absolute(tokenizer.path)})
    update: dict[str, Any] = {
        "data": data.model_copy(update={"source": source, "tokenizer": tokenizer})
    }
    if isinstance(recipe.model, PretrainedModel):
        path = _absolute(recipe.model.path)
        update["model"] = recipe.model.model_copy(update={"path": path})
    return recipe.model_copy(update=update)


def _absolute(text: str) -> str:
    path = Path(text).expanduser()
    return str(path.resolve()) if path.exists() else text
