"""shoal serve: an OpenAI-compatible server for a model folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.terminal import say


def serve(
    model: Annotated[Path, typer.Argument(help="A model folder, or a run that has one.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings, such as replicate=2 port=8080."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file with a serve: section.")] = None,
) -> None:
    """Serve a model folder to OpenAI's clients; the same answer in any company, after any crash.

    Ctrl-C or SIGTERM stops taking requests and finishes those that are being answered.
    """
    from shoal.config.serve import serve_settings
    from shoal.config.yaml_text import read_mapping
    from shoal.observe.console import Console

    tree = None
    if config is not None:
        tree = read_mapping(config.read_text(encoding="utf-8"), source=str(config)).get("serve")
    settings = serve_settings(overrides or [], tree=tree)
    with Console(out=sys.stderr) as console:
        console.phase("importing torch and transformers")
        from shoal.launch.server import serve_forever

        serve_forever(model, settings=settings, phase=console.phase, say=say, began=console.close)
