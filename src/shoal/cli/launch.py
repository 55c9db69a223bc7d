"""shoal launch: train over several hosts, whose agents a scheduler or a person has started."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.agent import Keys
from shoal.cli.terminal import say
from shoal.cli.train import Overrides
from shoal.environment import AGENT_PORT, torchrun_rendezvous
from shoal.errors import UserError

app = typer.Typer(
    help="Train over several hosts: by a file of them, or as a scheduler starts them.",
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
    etcd: Annotated[
        str | None,
        typer.Option(help="Servers of etcd, https://HOST:PORT,...: start this on several hosts."),
    ] = None,
    certificates: Annotated[
        Path | None, typer.Option(help="Folder with ca.pem, cert.pem and key.pem for etcd.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Use an etcd without TLS that others can reach.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--print", help="Print what to type on which host; start nothing.")
    ] = False,
) -> None:
    """Train over the hosts of a file, as their coordinator.

    Each of them runs `shoal agent` with the same --keys. --out and the cache (SHOAL_CACHE) are on
    storage that all of them see. A host that falls silent is done without; it may come back.
    With --etcd one of several coordinators leads, and another goes on from the last save when its
    host falls silent.
    """
    if hosts is None:
        raise UserError("--hosts: expected a file with a line HOST or HOST:PORT for every agent")
    if go_on and out is None:
        raise UserError("--go-on: expected the run's directory; give it by --out")
    if torchrun_rendezvous() is not None:
        raise UserError(
            "RANK and WORLD_SIZE are set, as torchrun sets them for every worker: the coordinator "
            "is one process\n    start it without torchrun; agents start the workers"
        )
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

        over, given = OverHosts(addresses, secret), overrides or []
        if etcd is None:
            result = local.train(recipe, given, out=out, pool=pool, go_on=go_on, hosts=over)
        else:
            from shoal.launch.elected import Servers, train_elected

            if out is None:
                raise UserError("--etcd: expected the run's directory; give it by --out")
            servers = Servers(etcd.split(","), certificates, insecure)
            result = train_elected(recipe, given, out=out, hosts=over, servers=servers, pool=pool)
    say("\n".join(last_words(result.run, result.summary, recipe=recipe)))


Recipe = Annotated[str, typer.Argument(help="A shipped recipe or a YAML file, as hosts see it.")]
Out = Annotated[Path, typer.Option(help="Directory of the run, on storage that all hosts share.")]
Secret = Annotated[Path, typer.Option("--keys", help="File with the secret that all hosts share.")]
Count = Annotated[int, typer.Option("--num-hosts", help="Number of hosts.")]
Port = Annotated[int, typer.Option(help="Port at which the agents listen.")]


@app.command("slurm")
def slurm(
    recipe: Recipe, out: Out, keys: Secret, num_hosts: Count, overrides: Overrides = None
) -> None:
    """Print a script for sbatch: an agent on each host, the coordinator on the first.

    The job may be run again: it goes on with what is there.
    """
    from shoal.launch.clusters.slurm import script
    from shoal.launch.clusters.start import Start

    text = script(Start(recipe, overrides or [], out, num_hosts, keys, port=0))
    say(text.rstrip(), verbatim=True)


@app.command("kubernetes")
def kubernetes(
    recipe: Recipe,
    out: Out,
    keys: Secret,
    num_hosts: Count,
    image: Annotated[str, typer.Option(help="Image with shoal in it.")],
    claim: Annotated[str, typer.Option(help="PersistentVolumeClaim with the folder of --out.")],
    overrides: Overrides = None,
    name: Annotated[str, typer.Option(help="Of the Job and its Service.")] = "shoal",
    port: Port = AGENT_PORT,
) -> None:
    """Print an Indexed Job with its Service and ConfigMap, for kubectl apply.

    The secret is one of your own: kubectl create secret generic NAME-keys --from-file=keys=FILE.
    """
    from shoal.launch.clusters.kubernetes import manifests
    from shoal.launch.clusters.start import Start

    start = Start(recipe, overrides or [], out, num_hosts, keys, port)
    say(manifests(start, name=name, image=image, claim=claim).rstrip(), verbatim=True)


@app.command("ray")
def ray(
    recipe: Recipe,
    out: Out,
    keys: Secret,
    num_hosts: Count,
    overrides: Overrides = None,
    cpus: Annotated[int, typer.Option(help="Of each host, as Ray counts them.")] = 1,
    port: Port = AGENT_PORT,
) -> None:
    """Print a driver for Ray: an actor on each host that runs its agent, the coordinator on one.

    Start it by `python FILE`, or by `ray job submit`. What it imports is ray alone.
    """
    from shoal.launch.clusters.ray import driver
    from shoal.launch.clusters.start import Start

    say(driver(Start(recipe, overrides or [], out, num_hosts, keys, port), cpus=cpus).rstrip())


@app.command("mpi")
def mpi(
    recipe: Recipe,
    out: Out,
    keys: Secret,
    hosts: Annotated[Path, typer.Option(help="File with a line HOST for every host.")],
    overrides: Overrides = None,
    port: Port = AGENT_PORT,
) -> None:
    """Print the command of mpirun that starts an agent on each host, and the coordinator.

    MPI only starts them: training goes on without it.
    """
    from shoal.launch.clusters.hosts_file import read_hosts
    from shoal.launch.clusters.mpi import command
    from shoal.launch.clusters.start import Start

    start = Start(recipe, overrides or [], out, len(read_hosts(hosts)), keys, port)
    say(command(start, hosts=hosts), verbatim=True)
