"""shoal launch: train over several hosts, whose agents a scheduler or a person has started."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.agent import Keys
from shoal.cli.terminal import say
from shoal.cli.train import Overrides
from shoal.errors import UserError

app = typer.Typer(
    help="Train over several hosts: by a file of hosts.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("hosts")
def hosts(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe or a YAML file.")],
    overrides: Overrides = None,
    hosts: Annotated[
        Path | None, typer.Option(help="File with a line HOST or HOST:PORT for every agent.")
    ] = None,
    keys: Keys = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the run, seen by all.")] = None,
    go_on: Annotated[
        bool, typer.Option("--go-on", help="If --out holds a run of this recipe, go on with it.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--print", help="Print what to type on which host; start nothing.")
    ] = False,
) -> None:
    """Train over the hosts of a file, as their coordinator.

    Each of them runs `shoal agent` with the same --keys. --out and the cache (SHOAL_CACHE) are on
    storage that all of them see. A host that falls silent is done without; it may come back.
    """
    if hosts is None:
        raise UserError("--hosts: expected a file with a line HOST or HOST:PORT for every agent")
    if go_on and out is None:
        raise UserError("--go-on: expected the run's directory; give it by --out")
    from shoal.launch.clusters.hosts_file import commands, read_hosts
    from shoal.launch.secret import read_secret

    addresses = read_hosts(hosts)
    if show:
        options = {"--hosts": hosts, "--keys": keys, "--out": out}
        given = [word for name, path in options.items() if path for word in (name, str(path))]
        words = ["shoal", "launch", "hosts", recipe, *(overrides or []), *given]
        words += ["--go-on"] if go_on else []
        say("\n".join(commands(addresses, keys=keys or Path("KEYS"), coordinator=words)))
        return
    secret = read_secret(keys)
    from shoal.launch.pool import WorkerPool

    with WorkerPool() as pool:  # before anything else is imported: its own imports take longest
        from shoal.launch import local
        from shoal.launch.over_hosts import OverHosts
        from shoal.launch.summary import last_words

        over = OverHosts(addresses, secret)
        result = local.train(recipe, overrides or [], out=out, pool=pool, go_on=go_on, hosts=over)
    say("\n".join(last_words(result.run, result.summary, recipe=recipe)))
