"""A rank as its supervisor sees it: the worker that has it now, and how far that is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.errors import Stopped
from shoal.launch.cluster import Cluster
from shoal.launch.pool import Worker
from shoal.launch.site import Site
from shoal.layout import Layout

STOPPED = Stopped.exit_status
WAITING = "waiting for a generation"


@dataclass
class SupervisedWorker:
    """A rank of the run, and the worker process that has it now."""

    rank: int
    site: Site
    worker: Worker
    waiting: bool = False
    """Built, and waiting for a generation."""
    generation: int = 0
    """The generation it was last told to join."""
    error: dict[str, Any] | None = None
    stuck: str | None = None
    done: bool = False
    """It has come to its end and said so."""
    absent: bool = False
    """Its host has gone, and the others go on without it until it is back."""

    @property
    def alive(self) -> bool:
        return self.worker.status is None


def left_by_another(sites: Sequence[Site], *, layout: Layout) -> list[SupervisedWorker]:
    """Workers that run there for a coordinator that is lost, by rank; ended unless of use.

    They are of use if they hold every part of a state, and the run was not about to end.
    """
    found = [(one, site) for site in sites for one in site.found()]
    held = {layout.replica_rank(one.rank) for one, _ in found if one.generation > 0}
    if len(held) < layout.replica_workers or any(one.done for one, _ in found):
        for one, site in found:
            site.kill([one.worker])
        return []
    found.sort(key=lambda each: each[0].rank)
    return [
        SupervisedWorker(one.rank, site, one.worker, one.waiting, one.generation)
        for one, site in found
    ]


def is_ending(workers: Sequence[SupervisedWorker]) -> bool:
    """Whether some have ended well, as asked or at the end: there is no other generation then."""
    return any(one.done or one.worker.status == STOPPED for one in workers)


def left_behind(workers: Sequence[SupervisedWorker]) -> list[SupervisedWorker]:
    """Those that wait for a generation which nobody else will join: the others have ended well.

    They stopped, or came to the end, after the step in which a newcomer was announced.
    """
    left = [one for one in workers if one.alive and not one.done]
    others = [one for one in workers if not one.absent and one not in left]
    if not others or not all(one.done or one.worker.status == STOPPED for one in others):
        return []
    beats = [one.site.last_beat(one.rank) for one in left]
    waits = all(beat is not None and beat.phase == WAITING for beat in beats)
    return left if waits else []


def generation_orders(
    members: Sequence[SupervisedWorker], *, number: int, cluster: Cluster
) -> Iterator[tuple[SupervisedWorker, dict[str, Any]]]:
    """What each is told to join, in rank order; they count as members from then on."""
    for rank, one in enumerate(members):
        one.generation, one.waiting = number, False
        beside = [n for n, other in enumerate(members) if other.site is one.site]
        sizes: dict[str, Any] = {"rank": rank, "size": len(members), "here": len(beside)}
        if cluster.own_disks:
            hosts = list(dict.fromkeys(id(other.site) for other in members))
            host = None if cluster.whole_saves else hosts.index(id(one.site))
            sizes["disk"] = {"ranks": beside, "count": len(hosts), "host": host}
        yield one, {"order": "generation", "number": number, **sizes}


def stacks(workers: Sequence[SupervisedWorker]) -> Iterator[str]:
    """Lines that say what every thread of those that live does."""
    for one in workers:
        if one.alive:
            yield f"stack of worker {one.rank}:"
            yield one.site.stack(one.worker, stopped=False).rstrip()


def memory_kills(sites: Sequence[Site]) -> int:
    """Processes that hosts have ended for want of memory so far."""
    return sum(site.memory_kills() for site in sites)
