"""`shoal compare`: one recipe under several policies or layouts, and which one pays."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.terminal import say
from shoal.cli.train import Overrides


def compare(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe, or a YAML file.")],
    overrides: Overrides = None,
    sync: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND|SECTION", help="A policy; repeatable."),
    ] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(metavar="AXIS=N,...", help="A layout; repeatable."),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(metavar="RATE[,DELAY]", help="Between replicas, such as 20Mbit/s,10ms."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, from the seed on.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="New folder that keeps runs and picture.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train a recipe under several policies or layouts and show loss, speed and bytes of each.

    Every run has the same seeds and reads the same batches; the first is what others are held
    against.
    """
    from shoal.errors import RunError
    from shoal.prove.compare import Choice
    from shoal.prove.compare import compare as run

    if out is not None and out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise RunError(f"{out}: exists and is not empty; choose another --out")
    choices = [*map(Choice.of_sync, sync or []), *map(Choice.of_layout, layout or [])]
    with tempfile.TemporaryDirectory(prefix="shoal-") as scratch:
        where = out or Path(scratch)
        where.mkdir(parents=True, exist_ok=True)
        found = run(
            recipe,
            overrides or [],
            choices=choices,
            out=where,
            seeds=seeds,
            link=link,
            console=not as_json,
        )
    say(json.dumps(found.to_json(), indent=1) if as_json else str(found), verbatim=as_json)
    if out is not None and not as_json:
        say(f"runs, figures and picture: {out}")
