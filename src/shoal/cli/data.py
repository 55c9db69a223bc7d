"""`shoal data`: list and fetch registry entries, preview samples, verify which a run read."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.terminal import say, tell
from shoal.cli.train import Overrides

app = typer.Typer(
    help="List and fetch data, show samples of a recipe, and verify which ones a run has read.",
    no_args_is_help=True,
)


@app.command("list")
def list_entries() -> None:
    """Show the registry: name, size, licence, and whether it is in the cache."""
    from shoal.data import fetch, registry
    from shoal.data.made import MADE
    from shoal.units import format_bytes

    for entry in registry.PACKAGES.values():
        kind = "model" if entry.is_model else "data"
        here = "in the cache" if fetch.is_unpacked(entry.directory) else "not fetched"
        size = format_bytes(entry.download_bytes)
        say(f"{entry.name:22} {kind:6} {size:>9}  {here:13} {entry.summary}")
        say(f"{'':22} {entry.requirement}, licence: {entry.licence}")
    for name, made in MADE.items():
        say(f"{name:22} data   {'':>9}  {'made here':13} {made.summary}")


@app.command("get")
def get_entry(name: Annotated[str, typer.Argument(help="A name from `shoal data list`.")]) -> None:
    """Fetch an entry into the cache and print where it lies."""
    from shoal.data import registry

    path = registry.get(name, announce=tell)
    say(str(path), verbatim=True)


@app.command("preview")
def preview(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe or a YAML file.")],
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="How many to show.")] = 3,
) -> None:
    """Show the first samples of a run as its model will see them, token by token.

    Targets, which the loss is computed on, are green on a terminal, else between « and ».
    """
    import sys

    from shoal.config.load import load_recipe
    from shoal.data.preview import previews
    from shoal.data.tokenize import load_tokenizer
    from shoal.launch.prepare import prepare_inputs
    from shoal.observe.visible import visible
    from shoal.tasks.kinds import create

    resolved = load_recipe(recipe, overrides or [])
    inputs = prepare_inputs(resolved, say=tell)
    task = create(resolved.task.kind, settings=inputs.task_settings, options=resolved.task)
    folder = inputs.tokenizer_directory
    terminal = sys.stdout.isatty()

    def mark(text: str) -> str:
        text = visible(text)
        return typer.style(text, fg=typer.colors.GREEN) if terminal else f"«{text}»"

    for line in previews(
        inputs.data_directory,
        count=samples,
        seed=resolved.seed,
        tokenizer=None if folder is None else load_tokenizer(folder),
        shifted=task.causal,
        labels=task.model_settings().get("id2label", {}),
        plain=visible,
        mark=mark,
        drawn=partial(task.drawn, seed=resolved.seed),
    ):
        say(line, styled=True)


@app.command("verify")
def verify(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Prove from the log of a run that no sample was lost or read twice."""
    from shoal.data.verify import verify_run

    report = verify_run(run)
    say(str(report))
    if report.problems:
        raise typer.Exit(1)
