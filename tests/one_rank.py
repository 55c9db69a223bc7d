"""What a worker of a test does around its training: start, meet the others, build, leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from shoal.comm.group import ProcessGroup
from shoal.engine.build import build
from shoal.engine.job import Job
from shoal.engine.training import Training
from shoal.observe.events import Report
from shoal.parallel.ranks import meet
from shoal.runtime import WorkerInfo, start_process_group, start_worker, stop_process_group


@contextmanager
def built(payload: dict[str, Any], descriptor: int) -> Iterator[Training]:
    """The training of rank `payload["rank"]`, among workers that meet in the folder `out`."""
    job, rank = Job.from_json(payload), payload["rank"]
    layout = job.decision.layout
    worker = WorkerInfo(rank, layout.workers, torch.device("cpu"), 1)
    start_worker(worker, seed=job.recipe.seed)
    if layout.workers > 1:
        start_process_group(
            rank=rank,
            size=layout.workers,
            device=worker.device,
            meeting=(Path(payload["out"]) / ".meeting").as_uri(),
            timeout_seconds=60,
        )
    group = ProcessGroup()
    group.reopen()
    try:
        ranks = meet(group, layout=layout, device=worker.device)
        yield build(job, ranks=ranks, worker=worker, report=Report(descriptor))
    finally:
        stop_process_group()
