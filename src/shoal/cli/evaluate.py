"""shoal evaluate: score a run or a model folder on a recipe's validation part."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.terminal import say
from shoal.cli.train import Overrides


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="RUN|MODEL", help="A run or a model folder.")],
    recipe: Annotated[str, typer.Argument(help="The recipe whose data and task to score on.")],
    overrides: Overrides = None,
) -> None:
    """Score a run or a model folder on the validation part of a recipe; prints JSON."""
    from shoal.launch.score import score
    from shoal.observe.console import Console

    with Console(out=sys.stderr) as console:
        console.phase("reading the recipe and the model")
        scores = score(model, recipe=recipe, overrides=overrides or [], console=console)
    say(json.dumps(scores, indent=1), verbatim=True)
