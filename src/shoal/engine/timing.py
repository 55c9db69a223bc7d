"""Timing workers: the real training of a recipe under one setup, stepped when told to.

What they run is what a run would: `build`, then batches, passes and update. Nothing is written.
An order is a line of JSON: `samples` rows of this rank in micro batches of `micro`, with `threads`
compute threads, `times` times. Rank 0 answers with seconds: of the passes, and of what a step
does once (reduction, update, the hash that replicas compare).
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch

from shoal.comm.group import Group, ProcessGroup
from shoal.comm.threads import Meeting, ThreadGroup
from shoal.engine.build import build
from shoal.engine.job import Job
from shoal.engine.membership.digest import digest_of
from shoal.engine.step import Step, Votes
from shoal.engine.training import Training
from shoal.engine.worker import report_failure
from shoal.layout import Share
from shoal.observe.events import Report
from shoal.parallel.ranks import whole
from shoal.runtime import WorkerInfo, start_process_group, start_worker, stop_process_group

_TIMEOUT_SECONDS = 120.0


@dataclass(frozen=True)
class Order:
    """What to time."""

    micro: int
    samples: int
    threads: int
    times: int = 1


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of one timing worker; says `built`, then one `turn` for each order."""
    report, rank, job = Report(descriptor), payload["rank"], Job.from_json(payload)
    try:
        if job.decision.workers == "threads" and job.decision.layout.workers > 1:
            _threads(job, report=report, orders=_orders(descriptor))
        else:
            _process(job, rank=rank, report=report, orders=_orders(descriptor))
    except BaseException as error:
        return report_failure(error, report=report, rank=rank)
    return 0


def _orders(descriptor: int) -> Iterator[Order]:
    """What the launcher says, until it goes."""
    with os.fdopen(os.dup(descriptor), encoding="utf-8") as lines:
        for line in lines:
            yield Order(**json.loads(line))


def _process(job: Job, *, rank: int, report: Report, orders: Iterable[Order]) -> None:
    size = job.decision.layout.workers
    worker = WorkerInfo(rank, size, torch.device("cpu"), job.decision.threads_per_worker)
    start_worker(worker, seed=job.recipe.seed)
    if size > 1:
        start_process_group(
            rank=rank,
            size=size,
            device=worker.device,
            meeting=(job.run / f"meeting-{size}").as_uri(),
            timeout_seconds=_TIMEOUT_SECONDS,
        )
    try:
        _serve(job, group=ProcessGroup(), worker=worker, report=report, orders=orders)
    finally:
        stop_process_group()


def _threads(job: Job, *, report: Report, orders: Iterable[Order]) -> None:
    """One thread per replica; the first failure frees the others, who then fail too."""
    size = job.decision.layout.workers
    meeting = Meeting(size, timeout_seconds=_TIMEOUT_SECONDS)
    queues: list[SimpleQueue[Order]] = [SimpleQueue() for _ in range(size)]

    def body(rank: int) -> None:
        worker = WorkerInfo(rank, size, torch.device("cpu"), job.decision.threads_per_worker)
        group = ThreadGroup(meeting, rank=rank)
        try:
            start_worker(worker, seed=job.recipe.seed)
            own = iter(queues[rank].get, None)
            _serve(job, group=group, worker=worker, report=report, orders=own)
        except BaseException as error:
            meeting.fail(f"{type(error).__name__}: {error}")
            report_failure(error, report=report, rank=rank)

    for rank in range(size):
        threading.Thread(target=body, args=(rank,), daemon=True).start()
    for order in orders:
        for queue in queues:
            queue.put(order)


def _serve(
    job: Job, *, group: Group, worker: WorkerInfo, report: Report, orders: Iterable[Order]
) -> None:
    """Build, then do what is ordered."""
    training = build(job, ranks=whole(group, device=worker.device), worker=worker, report=report)
    steps: dict[int, Step] = {}
    group.barrier()
    if worker.rank == 0:
        report.say("built")
    for order in orders:
        torch.set_num_threads(order.threads)
        if order.micro not in steps:
            steps[order.micro] = training.step.in_micro_batches_of(order.micro)
        spent = [_timed(training, steps[order.micro], order) for _ in range(order.times)]
        if worker.rank == 0:
            means = [sum(column) / order.times for column in zip(*spent, strict=True)]
            report.say("turn", passes=means[0], update=means[1], hashing=means[2])


def _timed(training: Training, step: Step, order: Order) -> tuple[float, float, float]:
    """One step of the trainer's loop; seconds of its passes, of the rest, of hashing in it."""
    world, policy = training.ranks.world, training.policy
    number = training.update.step
    world.barrier()
    began = time.perf_counter()
    hashed = not policy.alone and training.is_hash_due(number)
    digest = digest_of(training.state) if hashed else None
    hashing = time.perf_counter() - began if hashed else 0.0
    share = Share(world.rank * order.samples, (world.rank + 1) * order.samples)
    policy.before_step(number)
    batch = training.batches(0, share)
    counted = step.count(batch, votes=Votes(), digest=digest)
    result = step.train(batch, share=share, counted=counted, step=0)
    passed = time.perf_counter()
    training.update.apply(result)
    policy.after_step(number, targets=result.targets)
    return passed - began - hashing, time.perf_counter() - passed + hashing, hashing
