"""A run over hosts whose coordinator may be lost: several stand by, etcd says which one leads."""

from __future__ import annotations

import hashlib
import secrets
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from shoal.config.load import resolve
from shoal.config.recipe import Recipe
from shoal.engine.membership.program import code_hash
from shoal.environment import usable_cores
from shoal.errors import UserError
from shoal.launch.directory import is_run
from shoal.launch.local import Result, train
from shoal.launch.over_hosts import OverHosts
from shoal.launch.pool import WorkerPool
from shoal.launch.prepare import source_digest
from shoal.launch.registry.etcd import Etcd
from shoal.launch.registry.membership import Membership
from shoal.launch.registry.records import HostFacts, Spec
from shoal.launch.registry.registered import Registered
from shoal.launch.registry.standby import Candidate
from shoal.launch.registry.store import Unknown, Unreachable
from shoal.observe.console import Console

_FILES = ("ca.pem", "cert.pem", "key.pem")


@dataclass(frozen=True)
class Servers:
    """The etcd of a run. `certificates`: a folder with ca.pem, cert.pem and key.pem."""

    endpoints: Sequence[str]
    certificates: Path | None = None
    insecure: bool = False

    def store(self, run: str) -> Etcd:
        """The store of one run. Raises UserError for files that are missing, RunError."""
        folder = self.certificates
        authority, certificate, key = (folder and folder / name for name in _FILES)
        for file in (authority, certificate, key):
            if file is not None and not file.is_file():
                raise UserError(f"--certificates: expected {file}, found none")
        return Etcd(
            self.endpoints,
            prefix=f"/shoal/{run}/",
            authority=authority,
            certificate=certificate,
            key=key,
            insecure=self.insecure,
        )


def name_of(run: Path, *, secret: bytes) -> str:
    """Of a run in the registry: nobody without its secret can tell which folder it is."""
    return hashlib.blake2b(str(run).encode(), key=secret[:64], digest_size=12).hexdigest()


def spec_of(recipe: Recipe, *, run: Path) -> Spec:
    """What all coordinators of a run have alike. Raises what reading a source of data raises."""
    return Spec(
        shoal=version("shoal"),
        torch=version("torch"),
        code=code_hash(),
        recipe=recipe.model_dump_json(),
        data=source_digest(recipe),
        run=str(run),
    )


def train_elected(
    recipe: str,
    overrides: Sequence[str],
    *,
    out: Path,
    hosts: OverHosts,
    servers: Servers,
    pool: WorkerPool,
) -> Result:
    """As `train`, by whichever coordinator leads; one that goes on takes up the last save.

    Raises Stopped where another coordinator has ended the run, RunError where this host's recipe,
    data or version of shoal is another than theirs.
    """
    run = out.resolve()
    name = name_of(run, secret=hosts.secret)
    me = HostFacts(
        host=f"{socket.gethostname()}-{secrets.token_hex(4)}",
        name=socket.gethostname(),
        address="",
        port=0,
        cores=usable_cores(),
    )
    resolved = resolve(recipe, [*overrides])
    replace(hosts, run=str(run)).overrides(resolved)  # what hosts cannot, before one leads
    with Console() as console:
        console.phase("reading the data, for other coordinators to compare")
        spec = spec_of(resolved, run=run)
        membership = Membership(servers.store(name), me)
        with Candidate(membership, spec, say=console.line) as candidate:

            def register(run: Path, say: Callable[[str], None]) -> Registered:
                return Registered(
                    Membership(servers.store(name), me),
                    term=lambda: candidate.term,
                    deposed=candidate.deposed,
                    run=run,
                    say=say,
                )

            def work(term: int) -> Result:
                with suppress(Unreachable, Unknown):  # then nothing begins either
                    register(run, console.line).recover()
                given = replace(hosts, register=register, run=str(run), term=term)
                given.without = is_run(out)
                return train(recipe, overrides, out=out, pool=pool, go_on=True, hosts=given)

            return candidate.lead(work)
