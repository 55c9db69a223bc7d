"""What runs inside a worker process: join the others, train (in one thread or several), report."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shoal.comm.group import Group, ProcessGroup
from shoal.comm.keys import Keys
from shoal.comm.threads import Meeting, ThreadGroup
from shoal.config.recipe import Recipe
from shoal.engine.decision import Decision
from shoal.engine.members import TIMEOUT_SECONDS
from shoal.engine.orders import Orders
from shoal.engine.prepare import Inputs
from shoal.engine.trainer import Job, train
from shoal.errors import (
    PeersLost,
    ShoalError,
    Stopped,
    UserError,
    WorkerError,
    disk_problem,
    out_of_memory,
)
from shoal.observe.events import Report
from shoal.observe.pulse import Pulse
from shoal.runtime import (
    Place,
    choose_device,
    start_worker,
    stop_process_group,
)


@dataclass(frozen=True)
class Seat:
    """Which worker this process is."""

    rank: int
    size: int
    local_rank: int
    supervised: bool = False
    """Whether epochs are announced by a supervisor (launch/supervise.py)."""
    pulse: Path | None = None
    """The file that the supervisor watches."""
    stack: Path | None = None
    """Where SIGUSR1 writes what every thread of this worker does."""
    keys: Path | None = None
    """Folder of the keys for handing state from one worker to another."""


def job_from(payload: dict[str, Any]) -> Job:
    """The job described by a launcher's payload."""
    return Job(
        recipe=Recipe.model_validate(payload["recipe"]),
        run=Path(payload["run"]),
        inputs=Inputs.from_json(payload["inputs"]),
        decision=Decision.from_json(payload["decision"]),
        resume=payload["resume"],
        joining=payload.get("joining", False),
        faults=tuple(payload.get("faults", ())),
        final_model=payload.get("final_model", True),
        fault=payload.get("fault"),
        score=payload.get("score"),
        record=payload.get("record", False),
        double=payload.get("double", False),
    )


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of a worker of the fork server; returns its exit status."""
    seat = Seat(
        payload["rank"],
        payload["size"],
        payload["rank"],
        supervised=True,
        pulse=Path(payload["pulse"]),
        stack=Path(payload["stack"]),
        keys=Path(payload["keys"]),
    )
    orders = Orders().listen(descriptor)
    return run_seat(job_from(payload), seat=seat, report=Report(descriptor), orders=orders)


def run_seat(job: Job, *, seat: Seat, report: Report, orders: Orders | None = None) -> int:
    """Train as `seat`; every failure becomes one message and an exit status."""
    orders = orders or Orders()
    signal.signal(signal.SIGTERM, lambda *_: orders.stop.set())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # the fork server blocks it
    if seat.stack is not None:
        stack = os.open(seat.stack, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    try:
        if job.decision.workers == "threads" and job.decision.layout.workers > 1:
            _run_threads(job, seat=seat, report=report, orders=orders)
        else:
            _run_process(job, seat=seat, report=report, orders=orders)
    except Stopped as error:
        report.say("stopped", text=str(error))
        return error.exit_status
    except BaseException as error:
        return tell(error, report=report, rank=seat.rank)
    finally:
        sys.stdout.flush()
    report.say("ended", rank=seat.rank)
    return 0


def tell(error: BaseException, *, report: Report, rank: int) -> int:
    """Report what ended a worker, a person's mistake apart from ours; returns its exit status."""
    full = disk_problem(error) if isinstance(error, OSError) else None
    if isinstance(error, UserError) or full is not None:
        name = type(error).__name__
        report.say("error", user=True, type=name, text=full or str(error), rank=rank)
        return UserError.exit_status
    report.say(
        "error",
        user=False,
        text=f"{type(error).__name__}: {error}",
        trace=traceback.format_exc(),
        rank=rank,
        cause=not isinstance(error, PeersLost | WorkerError),
        out_of_memory=out_of_memory(error),
    )
    return getattr(error, "exit_status", 1)


def _run_process(job: Job, *, seat: Seat, report: Report, orders: Orders) -> None:
    device = choose_device(job.recipe.launch.device, local_rank=seat.local_rank)
    place = Place(seat.rank, seat.size, device, job.decision.threads_per_worker)
    start_worker(place, seed=job.recipe.seed)
    group = ProcessGroup(pulse=Pulse(seat.pulse, slot=seat.rank))
    try:
        train(
            job,
            group=group,
            place=place,
            report=report,
            orders=orders,
            supervised=seat.supervised and job.score is None,
            keys=None if seat.keys is None else Keys.read(seat.keys),
        )
    finally:
        stop_process_group()


def _run_threads(job: Job, *, seat: Seat, report: Report, orders: Orders) -> None:
    """One thread per replica; the first failure ends them all, and is the one that is raised."""
    size = job.decision.layout.workers
    meeting = Meeting(size, timeout_seconds=TIMEOUT_SECONDS)
    failures: list[tuple[int, BaseException]] = []
    device = torch.device("cpu")

    def body(rank: int) -> None:
        place = Place(rank, size, device, job.decision.threads_per_worker)
        pulse = Pulse(seat.pulse, slot=rank)
        group: Group = ThreadGroup(meeting, rank=rank, pulse=pulse)
        try:
            start_worker(place, seed=job.recipe.seed)
            train(job, group=group, place=place, report=report, orders=orders)
        except BaseException as error:
            failures.append((rank, error))
            if not isinstance(error, Stopped):
                meeting.fail(f"worker {rank}: {type(error).__name__}: {error}")

    threads = [
        threading.Thread(target=body, args=(rank,), name=f"replica-{rank}") for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():  # a plain join would keep signals from being handled
            thread.join(timeout=0.2)
    first = [error for _, error in failures if not isinstance(error, WorkerError)]
    if failures:
        error = (first or [failures[0][1]])[0]
        if isinstance(error, ShoalError):
            raise error
        raise WorkerError(f"{type(error).__name__}: {error}") from error
