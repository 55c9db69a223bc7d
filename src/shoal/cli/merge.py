"""shoal merge: one full Hugging Face model from a checkpoint, checked against its fingerprint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer


def merge(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run, or one of its checkpoints.")
    ],
    out: Annotated[Path, typer.Option(help="New folder for the model.")],
    memory_limit: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Most tensor bytes in memory at once, such as 2GB."),
    ] = None,
) -> None:
    """Merge the newest good checkpoint of a run, or the one named, into one Hugging Face model."""
    from shoal.checkpoint.store import Store
    from shoal.engine.export import merge as write
    from shoal.engine.export import opened_by_transformers
    from shoal.errors import RunError, UserError
    from shoal.launch.directory import open_run
    from shoal.units import parse_bytes

    try:
        limit = None if memory_limit is None else parse_bytes(memory_limit)
    except ValueError as error:
        raise UserError(f"--memory-limit: {error}") from None
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise RunError(f"{out}: exists and is not empty; choose another --out")
    match = re.fullmatch(r"step-(\d+)", source.name)
    if match:
        store, step = Store(source.parent), int(match[1])
        store.verify(step)
    else:
        store = Store(open_run(source) / "checkpoints")
        step = store.newest_good(on_bad=lambda at, why: print(f"passing over step {at}: {why}"))
    reader = store.open(step)
    difference = write(reader, out=out, limit_bytes=limit)
    if difference is None:
        checked = "every byte read is the one saved (hashes); logits not compared: --memory-limit"
    else:
        checked = f"its logits are those saved (difference {difference:.1e})"
    print(f"{out}: the model of step {step}; {checked}")
    if limit is None and (opened := opened_by_transformers(reader, out=out)) is not None:
        print(f"opened by transformers it {opened}")
