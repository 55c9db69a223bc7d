"""What a worker of a test does around its training: start, meet the others, build, leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from shoal.comm.group import ProcessGroup
from shoal.engine.build import Training, build
from shoal.engine.ranks import meet
from shoal.engine.worker import job_from
from shoal.observe.events import Report
from shoal.runtime import Place, start_process_group, start_worker, stop_process_group


@contextmanager
def built(payload: dict[str, Any], descriptor: int) -> Iterator[Training]:
    """The training of rank `payload["rank"]`, among workers that meet in the folder `out`."""
    job, rank = job_from(payload), payload["rank"]
    layout = job.decision.layout
    place = Place(rank, layout.workers, torch.device("cpu"), 1)
    start_worker(place, seed=job.recipe.seed)
    if layout.workers > 1:
        start_process_group(
            rank=rank,
            size=layout.workers,
            device=place.device,
            store=Path(payload["out"]) / ".meeting",
            timeout_seconds=60,
        )
    group = ProcessGroup()
    group.reopen()
    try:
        ranks = meet(group, layout=layout, device=place.device)
        yield build(job, ranks=ranks, place=place, report=Report(descriptor))
    finally:
        stop_process_group()
