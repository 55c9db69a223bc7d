"""`shoal data`: list and fetch registry entries, verify which samples a run read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.terminal import say, tell

app = typer.Typer(
    help="List and fetch data, and verify which samples a run has read.", no_args_is_help=True
)


@app.command("list")
def list_entries() -> None:
    """Show the registry: name, size, licence, and whether it is in the cache."""
    from shoal.data import fetch, registry
    from shoal.units import format_bytes

    for entry in registry.PACKAGES.values():
        kind = "model" if entry.is_model else "data"
        here = "in the cache" if fetch.is_unpacked(entry.directory) else "not fetched"
        size = format_bytes(entry.download_bytes)
        say(f"{entry.name:22} {kind:6} {size:>9}  {here:13} {entry.summary}")
        say(f"{'':22} {entry.requirement}, licence: {entry.licence}")


@app.command("get")
def get_entry(name: Annotated[str, typer.Argument(help="A name from `shoal data list`.")]) -> None:
    """Fetch an entry into the cache and print where it lies."""
    from shoal.data import registry

    path = registry.get(name, announce=tell)
    say(str(path))


@app.command("verify")
def verify(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Prove from the log of a run that no sample was lost or read twice."""
    from shoal.data.verify import verify_run

    report = verify_run(run)
    say(str(report))
    if report.problems:
        raise typer.Exit(1)
