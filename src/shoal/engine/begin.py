"""A rank takes its place among the others, and trains."""

from __future__ import annotations

from functools import partial
from typing import Any

from shoal.comm.group import Group
from shoal.comm.keys import Keys
from shoal.comm.link import link_of
from shoal.engine.build import build
from shoal.engine.job import Job
from shoal.engine.membership.members import members_of
from shoal.engine.membership.orders import Orders
from shoal.engine.rollouts import MakesWrites
from shoal.engine.trainer import Trainer
from shoal.observe.events import Report
from shoal.runtime import WorkerInfo


def train(
    job: Job,
    *,
    group: Group,
    worker: WorkerInfo,
    report: Report,
    orders: Orders,
    make_writes: MakesWrites | None = None,
    supervised: bool = False,
    keys: Keys | None = None,
) -> None:
    """Train to the end of the recipe, or until asked to stop. Raises Stopped after saving."""
    near = getattr(job.recipe.sync, "group_replicas", None) or 1  # no link between these
    link = link_of(job.recipe.launch.link, workers=near * job.decision.layout.replica_workers)
    known: dict[str, Any] = {"orders": orders, "worker": worker, "report": report}
    members = members_of(group, **known, supervised=supervised, keys=keys, link=link)
    make = partial(build, job, worker=worker, report=report, make_writes=make_writes)
    Trainer(job, group=group, members=members, build=make, **known).run()
