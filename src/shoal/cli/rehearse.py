"""`shoal rehearse`: run a recipe with scheduled faults, real ones, and see what is survived."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.terminal import say
from shoal.cli.train import Overrides


def rehearse(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe, or a YAML file.")],
    overrides: Overrides = None,
    fault: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND:RANK@STEP[:ARGUMENT]", help="Such as kill:1@20; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Keep both runs here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a recipe with faults and see what it survives; exit status 1 if anything was lost.

    Every fault must be noticed and no committed step be lost, for exit status 0.
    """
    from shoal.errors import ConfigError, Problem
    from shoal.prove.rehearse import Fault
    from shoal.prove.rehearse import rehearse as run

    faults = [Fault.parse(text) for text in fault or []]
    if not faults:
        raise ConfigError([Problem("--fault", "none given", "such as --fault kill:1@20")])
    with tempfile.TemporaryDirectory(prefix="shoal-") as scratch:
        found = run(
            recipe,
            overrides or [],
            faults=faults,
            out=out or Path(scratch),
            console=not as_json,
        )
    say(json.dumps(found.to_json(), indent=1) if as_json else str(found), verbatim=as_json)
    raise typer.Exit(0 if found.survived else 1)
