"""Where the workers of a run are: on this host, unless others are given (launch/over_hosts.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from shoal.engine.job import Job
from shoal.launch.cluster import Cluster, ThisHost
from shoal.launch.pool import WorkerPool
from shoal.launch.site import LocalSite, Site

Sites = Callable[[Job, WorkerPool], AbstractContextManager[tuple[Sequence[Site], Cluster]]]
"""Opens the sites of a job, and says where their ranks meet."""


@contextmanager
def this_host(job: Job, pool: WorkerPool) -> Iterator[tuple[Sequence[Site], Cluster]]:
    """All workers on this host."""
    with LocalSite(pool, num_ranks=job.decision.layout.workers) as site:
        yield [site], ThisHost(site.folder)
