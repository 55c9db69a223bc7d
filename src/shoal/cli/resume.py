"""shoal resume: go on with a run from its newest good checkpoint, in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.terminal import say
from shoal.cli.train import Overrides, refuse_copies


def resume(
    run: Annotated[Path, typer.Argument(help="Directory of the run.")],
    overrides: Overrides = None,
    data_changed: Annotated[
        bool,
        typer.Option(
            "--data-changed",
            help="Go on although the data is not what it was; tokenizer and model stay.",
        ),
    ] = False,
) -> None:
    """Go on with a run from its newest good checkpoint, in the same or any other layout.

    Keys that change are announced and kept in RUN/events.jsonl.
    """
    from shoal.environment import torchrun_rendezvous

    refuse_copies("resume")
    rendezvous = torchrun_rendezvous()
    if rendezvous is not None:
        from shoal.launch.torchrun import join_resume

        raise typer.Exit(
            join_resume(run, overrides or [], rendezvous=rendezvous, data_changed=data_changed)
        )
    from shoal.launch.pool import WorkerPool

    with WorkerPool() as pool:  # before anything else is imported: its own imports take longest
        from shoal.launch import local
        from shoal.launch.summary import last_words

        result = local.resume(run, overrides or [], pool=pool, data_changed=data_changed)
    words = last_words(result.run, result.summary, recipe=str(run / "config.yaml"))
    say("\n".join(words))
