"""shoal resume: go on with a run from its newest good checkpoint, in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.terminal import say
from shoal.cli.train import Overrides


def resume(
    run: Annotated[Path, typer.Argument(help="Directory of the run.")],
    overrides: Overrides = None,
) -> None:
    """Go on with a run from its newest good checkpoint, in the same or any other layout.

    Keys that change are announced and kept in RUN/events.jsonl.
    """
    from shoal.environment import torchrun_rendezvous

    rendezvous = torchrun_rendezvous()
    if rendezvous is not None:
        from shoal.launch.torchrun import join_resume

        raise typer.Exit(join_resume(run, overrides or [], rendezvous=rendezvous))
    from shoal.launch.pool import WorkerPool

    with WorkerPool() as pool:  # before anything else is imported: its own imports take longest
        from shoal.launch import local
        from shoal.launch.summary import last_words

        result = local.resume(run, overrides or [], pool=pool)
    words = last_words(result.run, result.summary, recipe=str(run / "config.yaml"))
    say("\n".join(words))
