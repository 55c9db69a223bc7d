"""shoal generate: continue a prompt with a model folder; progress goes to standard error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.terminal import say


def generate(
    model: Annotated[Path, typer.Argument(help="A model folder, or a run that has one.")],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 60,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, help="The same seed, the same text.")] = 0,
) -> None:
    """Continue a prompt with a model folder, or with the model of a run."""
    from shoal.observe.console import Console
    from shoal.serve.generate import continue_prompt

    with Console(out=sys.stderr) as console:
        added = continue_prompt(
            model,
            prompt=prompt,
            tokens=tokens,
            temperature=temperature,
            seed=seed,
            say=console.phase,
        )
    say(prompt + added, verbatim=True)
