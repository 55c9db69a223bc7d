"""shoal run: a script with a loop of its own, on several workers of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    script: Annotated[Path, typer.Argument(help="A script that calls shoal.join().")],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGUMENTS", help="What the script is given.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Workers, each of which runs it.")] = 2,
) -> None:
    """Run a script with a training loop of its own on several workers, which join by shoal.join().

    Worker 0 prints. The exit status is the script's; an error names its worker. torchrun starts
    the same script on clusters.
    """
    from shoal.launch.pool import WorkerPool

    with WorkerPool() as pool:
        from shoal.fleet.script import run_script

        status = run_script(script, arguments or [], workers=workers, pool=pool)
    raise typer.Exit(status)
