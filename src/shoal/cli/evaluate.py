"""shoal evaluate: score a run or a model folder on a recipe's validation part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.train import Overrides


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="RUN|MODEL", help="A run or a model folder.")],
    recipe: Annotated[str, typer.Argument(help="The recipe whose data and task to score on.")],
    overrides: Overrides = None,
) -> None:
    """Scores as JSON."""
    from shoal.launch.score import score

    print(json.dumps(score(model, recipe=recipe, overrides=overrides or []), indent=1))
