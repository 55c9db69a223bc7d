"""shoal merge: one full Hugging Face model from a checkpoint, checked against its fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.terminal import say, tell


def merge(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN|CHECKPOINT", help="A run, or one of its checkpoints; or a URL of either."
        ),
    ],
    out: Annotated[Path, typer.Option(help="New folder for the model.")],
    memory_limit: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Most tensor bytes in memory at once, such as 2GB."),
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="The adapter alone, in peft's format.")
    ] = False,
) -> None:
    """Merge the newest good checkpoint of a run, or the one named, into one Hugging Face model."""
    from shoal.cli.api import merged

    step, difference, opened = merged(
        source, out=out, memory_limit=memory_limit, adapter=adapter, say=tell
    )
    if adapter:
        say(f"{out}: the adapter of step {step}, in peft's format")
        return
    if difference is None:
        checked = "every byte read is the one saved (hashes); logits not compared: --memory-limit"
    else:
        checked = f"its logits are those saved (difference {difference:.1e})"
    say(f"{out}: the model of step {step}; {checked}")
    if opened is not None:
        say(f"opened by transformers it {opened}")
