"""shoal agent: run and watch the workers of this host, for the coordinator of a run over hosts."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.terminal import say
from shoal.environment import AGENT_PORT

Keys = Annotated[
    Path | None,
    typer.Option(help="File with the secret that all hosts share; made if missing (SHOAL_KEYS)."),
]


def agent(
    keys: Keys = None,
    listen: Annotated[
        str, typer.Option(help="Address of this host at which the coordinator calls it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0: any that is free.")] = AGENT_PORT,
    once: Annotated[
        bool, typer.Option("--once", help="End with the first run, with its exit status.")
    ] = False,
) -> None:
    """Run and watch this host's workers for the coordinator of a run over several hosts.

    Start one on every host, then `shoal launch hosts` on one of them.
    """
    from shoal.launch.pool import WorkerPool
    from shoal.launch.secret import read_secret

    secret = read_secret(keys)
    with WorkerPool() as pool:
        from shoal.comm.keys import Keys as Pairs
        from shoal.errors import ChannelError, UserError
        from shoal.launch.agent import Agent

        try:
            served = Agent(pool, keys=Pairs.of(secret), bind=listen, port=port, say=say)
        except ChannelError as error:
            raise UserError(f"--listen: {error}") from None
        say(f"agent at {served.address}")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda *_: setattr(served, "leaving", True))
        try:
            raise typer.Exit(served.serve(once=once))
        finally:
            served.close()
