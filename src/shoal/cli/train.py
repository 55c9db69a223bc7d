"""shoal train: train a recipe on this machine, or join as one worker under torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as parallel.replicate=2."),
]


def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe or a YAML file.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the run (new or empty).")] = None,
) -> None:
    """Train RECIPE with any overrides; the run goes to --out or to the next free runs/ folder."""
    from shoal.environment import torchrun_rendezvous

    seat = torchrun_rendezvous()
    if seat is not None:
        from shoal.launch.torchrun import join

        raise typer.Exit(join(recipe, overrides or [], out=out, seat=seat))
    from shoal.launch.pool import WorkerPool

    with WorkerPool() as pool:  # before anything else is imported: its own imports take longest
        from shoal.launch import local
        from shoal.launch.summary import last_words

        result = local.train(recipe, overrides or [], out=out, pool=pool)
    print("\n".join(last_words(result.run, result.summary, recipe=recipe)))
