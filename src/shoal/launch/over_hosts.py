"""Train over several hosts: find their agents, check them, open their sites, choose where to meet.

The coordinator is this process. Every host has an agent (`shoal agent`) that knows the run's
secret; the run directory and the cache are on storage that all of them see.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shoal.checkpoint.objects import is_url
from shoal.comm.keys import Keys
from shoal.config.recipe import Recipe
from shoal.config.sync import EveryStep
from shoal.engine.decision import Decision, given_layout
from shoal.engine.job import Inputs, Job
from shoal.environment import address_towards, cache_directory
from shoal.errors import ConfigError, Problem, RunError, WorkerError
from shoal.launch import calls
from shoal.launch.agent import facts
from shoal.launch.choose import is_open
from shoal.launch.cluster import Cluster, Event, Host
from shoal.launch.directory import NOTE
from shoal.launch.giving import Giving, folders_of
from shoal.launch.hosts_plan import choose_over_hosts
from shoal.launch.links import Links
from shoal.launch.object_store import Say, placed
from shoal.launch.own_disks import OwnDisks
from shoal.launch.pool import Worker, WorkerPool
from shoal.launch.reach import Pair, Reach
from shoal.launch.registry.membership import Fenced
from shoal.launch.registry.registered import Registered
from shoal.launch.remote_site import RemoteSite
from shoal.launch.site import Site
from shoal.layout import Layout
from shoal.observe.console import Console

PATIENCE_SECONDS = 60.0
_SOON_SECONDS = 1.0
_RING_SECONDS = 9.0
"""For the three rounds of the test of links; of a second at most, on hosts that are not busy."""
_KEEP_SECONDS = 60.0
"""Of workers that have lost their coordinator: longer than the next one needs to lead."""
_OF_A_SAVE = ("step", "generation", "keep", "best")
_MEETING = "shoal.comm.meeting_place:run"


@dataclass
class OverHosts:
    """The hosts of a run, by the addresses (tcp://HOST:PORT) of their agents."""

    addresses: Sequence[str]
    secret: bytes = field(repr=False)
    patience_seconds: float = PATIENCE_SECONDS
    lease_seconds: float = calls.LEASE_SECONDS
    register: Callable[[Path, Callable[[str], None]], Registered] | None = None
    """Opens the registry for a run, where it has one; the second tells of the store's absence."""
    run: str = ""
    """The run folder, where a registry says who leads."""
    term: int = 0
    """In which this process leads then."""
    without: bool = False
    """Whether the run may begin without hosts that do not answer soon."""
    here: list[calls.Here] = field(default_factory=list)
    """What each host said of itself, once they were asked."""
    fetched: dict[str, int] = field(default_factory=dict)
    """Bytes of data, tokenizer and model that each host has read from others, by its name."""

    def ask(self, *, console: Console) -> None:
        """Hear what the hosts are. Raises RunError for those that cannot take part."""
        hello = calls.Hello(
            coordinator=_me(), nonce=secrets.token_hex(8), run=self.run, term=self.term
        )
        sites = self._called(hello)
        try:
            self._gather(sites, ready=lambda site: site.here is not None, console=console)
        finally:
            for site in sites:
                site.close()
        self.here = [site.here for site in sites if site.here is not None]

    def overrides(self, recipe: Recipe) -> list[str]:
        """What a recipe leaves open that hosts decide. Raises ConfigError for what they cannot."""
        problems = []
        if recipe.sync.kind in ("server", "hogwild"):
            what = f"{recipe.sync.kind} is for workers of one host"
            hint = "run without --hosts, or set sync.kind to every-step"
            problems.append(Problem("sync.kind", what, hint))
        if recipe.launch.workers == "threads":
            what = "workers of several hosts are processes"
            problems.append(Problem("launch.workers", what, "leave it out"))
        if recipe.launch.link is not None:
            what = "between hosts there is a link already"
            problems.append(Problem("launch.link", what, "set it to null"))
        if recipe.checkpoint.where != "shared" and self.run:
            what = "with --etcd saves are on storage that all hosts see"
            hint = "leave out --etcd, or checkpoint.where"
            problems.append(Problem("checkpoint.where", what, hint))
        replicas, count = recipe.parallel.replicas, len(self.addresses)
        planned = is_open(recipe) and count > 1
        layout = given_layout(recipe)
        if replicas is not None and layout.workers < count and not planned:
            what = f"{layout} does not reach {count} hosts"
            hint = f"set it to {count} or more, or divide a replica over hosts (parallel.pipeline)"
            problems.append(Problem("parallel.replicate", what, hint))
        if problems:
            raise ConfigError(problems)
        given = [] if replicas is not None or planned else [f"parallel.replicate={count}"]
        return [*given, *self._groups(recipe), "launch.workers=processes"]

    def _groups(self, recipe: Recipe) -> list[str]:
        """Exact runs have the same bits in groups: those of a host sum among themselves first."""
        sync, replicas, count = recipe.sync, recipe.parallel.replicas or 1, len(self.addresses)
        if not (isinstance(sync, EveryStep) and sync.codec.kind == "none" and recipe.train.exact):
            return []
        if sync.group_replicas or replicas % count or not replicas > count > 1:
            return []
        return [f"sync.group_replicas={replicas // count}"]

    @property
    def memory_bytes(self) -> int | None:
        """Memory of all hosts together, as if all had that of the smallest."""
        return min(host.memory_bytes for host in self.here) * len(self.here) or None

    def choose(
        self, recipe: Recipe, *, inputs: Inputs, pool: WorkerPool, console: Console
    ) -> Decision:
        """The decision for these hosts: what is open by their links (launch/hosts_plan.py)."""
        links = self._links(console=console) if len(self.addresses) > 1 else None
        return choose_over_hosts(
            recipe,
            inputs=inputs,
            here=self.here,
            count=len(self.addresses),
            links=links,
            pool=pool,
            console=console,
        )

    def _links(self, *, console: Console) -> Links | None:
        """How fast the hosts reach one another: from each to the next, all at once. Or None."""
        hello = calls.Hello(
            coordinator=_me(), nonce=secrets.token_hex(8), run=self.run, term=self.term
        )
        sites = self._called(hello)
        console.phase(
            f"measuring the links between {len(sites)} hosts (at most {_RING_SECONDS:.0f} s)"
        )
        try:
            self._gather(sites, ready=lambda site: site.here is not None, console=console)
            there = [site for site in sites if site.here is not None]
            found = []
            for shift, sends in ((1, False), (1, True), (0, True)):
                for number, site in enumerate(there):
                    other = there[(number + shift) % len(there)]
                    site.measure_link(other.open_address, sends=sends)
                deadline = time.monotonic() + _RING_SECONDS / 3
                while any(site.link is None for site in there) and time.monotonic() < deadline:
                    for site in there:
                        for _ in site.events(timeout_seconds=0.05 / len(there)):
                            pass
                links = [site.link for site in there if site.link is not None]
                found.append(links)
                if not all(each.round_trip_seconds for each in links):
                    return None  # a cable is cut: `_check_reach` says whose
        finally:
            for site in sites:
                site.close()
        return Links.of(*found)

    @contextmanager
    def sites(
        self, job: Job, pool: WorkerPool, *, console: Console
    ) -> Iterator[tuple[Sequence[Site], Cluster]]:
        """Open the hosts' sites for a job. Raises RunError for what they do not see."""
        run, text = job.run.resolve(), secrets.token_hex(16)
        note, where = run / NOTE, job.recipe.checkpoint.where
        own_disks, own_folders = where == "local", where != "shared"
        cached = cache_directory().resolve() / NOTE
        folders = folders_of(job.inputs)
        hello = calls.Hello(
            coordinator=_me(),
            nonce=text,
            run=str(run),
            lease_seconds=self.lease_seconds,
            ranks=job.decision.layout.workers,
            folders={str(folder): calls.folder_digest(folder) for folder in folders},
            note=("", "") if own_folders else (str(note), text),
            cache_note=(str(cached), text),
            own_disks=own_folders,
            store=where if is_url(where) else "",
            term=self.term,
            keep_seconds=_KEEP_SECONDS if self.term else 0.0,
            adopts=self.term > 0,
        )
        if not own_folders:
            note.write_text(text, encoding="utf-8")
        with suppress(OSError):  # then hosts check what they read
            cached.write_text(text, encoding="utf-8")
        sites = self._called(hello)
        giving = Giving(sites)
        status, another_leads = 1, False
        try:
            self._gather(sites, ready=lambda site: site.gone is None, console=console)
            if own_disks:
                _check_apart(sites)
            if not self.without:
                _check_reach(sites)
            for site in sites:
                site.begin()
            at, registered = _own_address(self.addresses), None
            if self.register is not None:
                registered = self.register(run, console.line)
            disks = OwnDisks(sites, run=run, say=console.line) if own_disks else None
            with _Meetings(
                pool,
                address=at,
                registered=registered,
                disks=disks,
                whole_saves=has_whole_saves(job.recipe, job.decision.layout, num_hosts=len(sites)),
                own_folders=own_folders,
                giving=giving,
            ) as cluster:
                yield sites, cluster
            if registered is not None:
                registered.close()
            status = cluster.status
        except Fenced:
            another_leads = True
            raise
        except BaseException as error:
            status = getattr(error, "exit_status", 1)
            raise
        finally:
            self.fetched = giving.num_bytes()
            for site in sites:
                site.close(status=status, another_leads=another_leads)
            for each in (cached, note):
                with suppress(OSError):
                    if not another_leads:  # whose note it is by now
                        each.unlink()

    def _called(self, hello: calls.Hello) -> list[RemoteSite]:
        keys, mine = Keys.of(self.secret), facts()

        def check(here: calls.Here) -> str | None:
            pairs = (
                (name, getattr(here, name), getattr(mine, name)) for name in ("shoal", "torch")
            )
            found = [
                f"has {name} {its} ({mine.name}: {ours})"
                for name, its, ours in pairs
                if its != ours
            ]
            if here.code != mine.code:
                found.append(f"has other source of shoal than {mine.name}")
            return "; ".join(found) or None

        return [RemoteSite(each, keys=keys, hello=hello, check=check) for each in self.addresses]

    def _gather(
        self,
        sites: Sequence[RemoteSite],
        *,
        ready: Callable[[RemoteSite], bool],
        console: Console,
    ) -> None:
        """Wait until all hosts are `ready`. Raises RunError for those that will not be."""
        began, said_at, wrong_at = time.monotonic(), 0.0, 0.0
        while not all(ready(site) and not site.wrong for site in sites):
            for site in sites:
                for _ in site.events(timeout_seconds=0.05 / len(sites)):
                    pass
            now = time.monotonic()
            if any(site.fetches for site in sites):  # which takes as long as it takes
                began = now
            wrong = [f"{site.name} {site.wrong}" for site in sites if site.wrong]
            missing = [site.name for site in sites if not ready(site) and not site.wrong]
            busy = all(site.busy for site in sites if site.wrong)
            wrong_at = (wrong_at or now) if wrong else 0.0
            # a coordinator that died holds its hosts for as long as a lease
            late = now - wrong_at > (2 * self.lease_seconds if busy else 1.0)
            if wrong and (late or (not missing and not busy)):
                raise RunError("hosts cannot take part in the run:\n    " + "\n    ".join(wrong))
            soon = now - began < min(_SOON_SECONDS, self.patience_seconds)
            if missing and self.without and len(missing) < len(sites) and not soon and not wrong:
                return
            if missing and now - began > self.patience_seconds:
                raise RunError(
                    f"{', '.join(missing)}: no agent answers for {self.patience_seconds:.0f} s\n"
                    "    start `shoal agent` there, with the same --keys; --listen says at which "
                    "address"
                )
            if missing and now - said_at > 2.0 and now - began > 1.0:
                said_at = now
                console.phase(f"waiting for the agents of {', '.join(missing)}")


def has_whole_saves(recipe: Recipe, layout: Layout, *, num_hosts: int) -> bool:
    """Whether each host has whole replicas, all alike, and so saves all of it on its own disk."""
    sync = recipe.sync
    alike = sync.kind == "every-step" and sync.codec.kind == "none"
    return alike and layout.replicate >= num_hosts


def _check_reach(sites: Sequence[RemoteSite]) -> None:
    """Raises RunError for hosts that do not reach each other, after a second test."""
    reach, there, cut = Reach(sites), range(len(sites)), set[Pair]()
    for _ in range(2):
        reach.ask()
        while reach.under_way:
            for site in sites:
                for _ in site.events(timeout_seconds=0.05 / len(sites)):
                    pass
            reach.look()
        cut = reach.cut(there)
        if not cut:
            return
    pairs = "\n    ".join(f"{sites[a].name} and {sites[b].name}" for a, b in sorted(cut))
    raise RunError(
        f"hosts do not reach each other, though this process reaches them:\n    {pairs}\n"
        "    workers connect to each other at ports that the system chooses; look for a firewall, "
        "or leave a host out of --hosts"
    )


def _check_apart(sites: Sequence[RemoteSite]) -> None:
    """Raises RunError for hosts that share the run folder though each is to have its own."""
    disks: dict[str, list[str]] = {}
    for site in sites:
        disks.setdefault(site.here.disk if site.here else "", []).append(site.name)
    shared = [names for names in disks.values() if len(names) > 1]
    if shared:
        raise RunError(
            f"{' and '.join(shared[0])} have the run folder in common, and would save over each "
            "other\n    leave checkpoint.where at shared, or choose an --out on their own disks"
        )


class _Meetings:
    """Where generations meet: at a store on this host, which a worker here keeps.

    With a registry a generation begins only once that has taken it down.
    """

    def __init__(
        self,
        pool: WorkerPool,
        *,
        address: str,
        registered: Registered | None,
        disks: OwnDisks | None,
        whole_saves: bool,
        own_folders: bool,
        giving: Giving,
    ) -> None:
        self._pool, self._address, self._registered = pool, address, registered
        self._disks, self._own_folders, self._giving = disks, own_folders, giving
        self.whole_saves = whole_saves
        """Whether each host has whole replicas, all alike, and saves all of it."""
        self._worker: Worker = pool.start(_MEETING, {"bind": address})
        self._asked: tuple[int, tuple[str, ...]] | None = None
        self._at = ""
        self.status = 1
        """Exit status of the run."""

    def __enter__(self) -> _Meetings:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.kill([self._worker])

    def hosts(self) -> list[Host]:
        return [Host(socket.gethostname(), self._address)]

    def meeting(self, generation: int, *, hosts: Sequence[str] = ()) -> str:
        asked = (generation, tuple(hosts))
        if asked != self._asked:
            self._at, self._asked = self._opened(generation), asked
        if self._registered is not None:
            self._registered.announce(hosts, meet=self._at)
        self._asked = None
        return self._at

    def _opened(self, generation: int) -> str:
        self._pool.send(self._worker, {"order": "open", "generation": generation})
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline and not self._worker.told:
            for _, said in self._pool.events(timeout_seconds=0.2, only=[self._worker]):
                if said is not None and said["generation"] == generation:
                    return f"tcp://{self._address}:{said['port']}"
        raise WorkerError(f"no store could be opened at {self._address} for the ranks to meet at")

    @property
    def registered(self) -> int:
        return 0 if self._registered is None else self._registered.number

    def saved(self, fields: Mapping[str, Any]) -> None:
        if self._registered is not None:
            self._registered.saved(**{name: fields[name] for name in _OF_A_SAVE})

    @property
    def own_disks(self) -> bool:
        return self._disks is not None

    @property
    def own_folders(self) -> bool:
        return self._own_folders

    def placed(self, job: Job, *, say: Say, begins: bool = False) -> Job:
        if self._disks is not None:
            return replace(job, resume=self._disks.place(begins=begins))
        return placed(job, begins=begins, say=say)

    def kept(self, site: Site, fields: Mapping[str, Any]) -> None:
        assert self._disks is not None and isinstance(site, RemoteSite), "it was told of a disk"
        self._disks.kept(site.name, fields)

    def look(self, *, last: bool = False) -> list[Event]:
        if self._registered is not None:
            self._registered.look()
        found = self._giving.events()
        if self._disks is not None:
            found += self._disks.close() if last else self._disks.look()
        return found

    def ended(self, *, status: int) -> None:
        self.status = status

    def servers(self) -> Path:
        raise AssertionError("refused before the start")


def _me() -> str:
    return f"process {os.getpid()} of {socket.gethostname()}"


def _own_address(addresses: Sequence[str]) -> str:
    """This host's address as its hosts reach it. Raises RunError."""
    found, problems = list[str](), list[str]()
    for each in addresses:
        host = each.removeprefix("tcp://").rpartition(":")[0]
        try:
            found.append(address_towards(host))
        except OSError as error:
            problems.append(f"{host}: no way leads there: {error.strerror or error}")
    if not found:
        raise RunError("\n".join(problems))
    outside = [address for address in found if not address.startswith("127.")]
    return (outside or found)[0]
