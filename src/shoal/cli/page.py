"""`shoal page`: the live page of runs, in a browser of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.terminal import say
from shoal.errors import UserError


def page(
    runs: Annotated[Path, typer.Argument(help="A run, or a folder that holds runs.")] = Path(
        "runs"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 8077,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    name: Annotated[
        list[str] | None, typer.Option(help="Another name by which browsers may ask; repeatable.")
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(help="A file with your own key; needed where other machines can connect."),
    ] = None,
) -> None:
    """Show runs while they train, and after: curves, workers, layout, plan, faults, samples.

    Open the printed address. It reads run directories only, so that nothing it does can slow or
    change a run but its two buttons, which leave the files SAVE and STOP. Ctrl-C ends it.
    """
    try:
        from shoal.page import server, web
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed, which the page needs\n    pip install 'shoal[page]'"
        ) from None

    own = None if key is None else web.read_key(key)
    server.show(runs, say=say, host=host, port=port, key=own, hosts=name or [])
