"""`shoal parity`: prove that a layout of this model equals one worker, with a certificate."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.terminal import say, tell
from shoal.cli.train import Overrides


def parity(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe, or a YAML file.")],
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps to compare.")] = 4,
    whole: Annotated[bool, typer.Option("--whole", help="The model as it is, not small.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="New folder that keeps the runs and the certificate.")
    ] = None,
    plant: Annotated[
        str | None, typer.Option(metavar="MISTAKE", help="Make a mistake, to see it caught.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="RECIPE is a model folder: prove that it is served so.")
    ] = False,
    requests: Annotated[int, typer.Option(min=2, help="With --serve: how many.")] = 50,
) -> None:
    """Prove that training in a layout equals training with one worker; exit status 1 if not.

    The tolerance is derived for the model; the figures go to a certificate with --out. --serve:
    that answers have the same bits alone and in any company, and that training agrees with them.
    """
    if serve:
        _served(Path(recipe), overrides or [], requests=requests, as_json=as_json)
    from shoal.errors import RunError
    from shoal.prove.parity import prove

    if out is not None and out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise RunError(f"{out}: exists and is not empty; choose another --out")
    with tempfile.TemporaryDirectory(prefix="shoal-") as scratch:
        found = prove(
            recipe,
            overrides or [],
            out=out or Path(scratch),
            steps=steps,
            whole=whole,
            mistake=plant,
            say=tell,
        )
    say(json.dumps(found.to_json(), indent=1) if as_json else str(found), verbatim=as_json)
    raise typer.Exit(0 if found.proven else 1)


def _served(model: Path, overrides: list[str], *, requests: int, as_json: bool) -> None:
    """The certificate of serving; ends the command."""
    from shoal.config.serve import serve_settings

    settings = serve_settings(overrides)
    tell("importing torch and transformers")
    from shoal.launch.certifying import certify_folder

    found = certify_folder(model, settings=settings, num_requests=requests, say=tell)
    say(json.dumps(found.to_json(), indent=1) if as_json else str(found), verbatim=as_json)
    raise typer.Exit(0 if found.proven else 1)
