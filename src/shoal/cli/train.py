"""shoal train: train a recipe on this machine, or join as one worker under torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.terminal import say
from shoal.errors import UserError

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, such as parallel.replicate=2."),
]


def refuse_copies(command: str) -> None:
    """Raises UserError where a scheduler has started this command several times: each would train
    alone, and end as if all were well."""
    from shoal.environment import started_together

    found = started_together()
    if found is not None:
        name, count = found
        kind = "slurm" if name.startswith("SLURM") else "mpi"
        raise UserError(
            f"{name}={count}: this command was started {count} times, and each would train alone\n"
            f"    shoal launch {kind} prints what starts a run over several hosts; or start "
            f"`shoal {command}` once"
        )


def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe or a YAML file.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the run (new or empty).")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained, and how; train nothing.")
    ] = False,
    go_on: Annotated[
        bool, typer.Option("--go-on", help="If --out holds a run of this recipe, go on with it.")
    ] = False,
) -> None:
    """Train a recipe; the run goes to --out, or to the next free folder below runs/.

    Any key of a recipe can be set here. `shoal config show RECIPE` prints every key with its value
    and what the run will do, `shoal config schema` what each may be; docs/guide/recipe.md says what
    each means.
    """
    from shoal.environment import torchrun_rendezvous

    refuse_copies("train")
    if go_on and out is None:
        raise UserError("--go-on: expected the run's directory; give it by --out")
    rendezvous = torchrun_rendezvous()
    if rendezvous is not None:
        if dry_run:
            raise UserError("--dry-run: it starts no workers; run it once, without torchrun")
        from shoal.launch.torchrun import join

        raise typer.Exit(join(recipe, overrides or [], out=out, rendezvous=rendezvous, go_on=go_on))
    from shoal.launch.pool import WorkerPool

    with WorkerPool() as pool:  # before anything else is imported: its own imports take longest
        from shoal.launch import local
        from shoal.launch.summary import last_words

        if dry_run:
            local.dry_run(recipe, overrides or [], pool=pool)
            return
        result = local.train(recipe, overrides or [], out=out, pool=pool, go_on=go_on)
    words = last_words(result.run, result.summary, recipe=recipe)
    say("\n".join(words))
