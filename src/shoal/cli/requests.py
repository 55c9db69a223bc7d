"""shoal stop, save and drain: ask something of a run that is under way, from any of its hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.terminal import say

Run = Annotated[Path, typer.Argument(help="Directory of a run that is under way.")]


def stop(run: Run) -> None:
    """Ask a run to save after the step under way, and to stop."""
    _leave(run, "STOP", done=f"asked {run} to save and stop; go on with: shoal resume {run}")


def save(run: Run) -> None:
    """Ask a run to save after the step under way, and to go on."""
    _leave(run, "SAVE", done=f"asked {run} to save")


def drain(
    host: Annotated[str, typer.Argument(help="Name or address of the host.")], run: Run
) -> None:
    """Ask a run over several hosts to do without one of them from now on.

    Its replicas go to other hosts, or are left out where the recipe lets the degree shrink.
    """
    _leave(run, "DRAIN", host, done=f"asked {run} to do without {host}")


def _leave(run: Path, name: str, text: str = "", *, done: str) -> None:
    from shoal.launch.directory import leave_request, open_run

    leave_request(open_run(run), name, text)
    say(done)
