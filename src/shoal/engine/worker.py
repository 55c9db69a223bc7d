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
from typing import Any, TypedDict

import torch

from shoal.comm.group import Group, ProcessGroup
from shoal.comm.keys import Keys
from shoal.comm.threads import Meeting, ThreadGroup
from shoal.engine.begin import train
from shoal.engine.job import Job
from shoal.engine.membership.members import TIMEOUT_SECONDS
from shoal.engine.membership.orders import Orders
from shoal.engine.rollouts import MakesWrites
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
    WorkerInfo,
    break_generation,
    choose_device,
    start_worker,
    stop_process_group,
)


class _Known(TypedDict):
    """What every rank of this process is given alike."""

    report: Report
    orders: Orders
    make_writes: MakesWrites | None


@dataclass(frozen=True)
class WorkerArguments:
    """Which worker this process is, and where it meets its supervisor."""

    rank: int
    size: int
    local_rank: int
    supervised: bool = False
    """Whether generations are announced by a supervisor (launch/supervise.py)."""
    pulse: Path | None = None
    """The file that the supervisor watches."""
    stack: Path | None = None
    """Where SIGUSR1 writes what every thread of this worker does."""
    keys: Path | None = None
    """Folder of the keys for handing state from one worker to another."""


def run(payload: dict[str, Any], descriptor: int, *, make_writes: MakesWrites | None = None) -> int:
    """A worker of the fork server; returns its exit status."""
    arguments = WorkerArguments(
        payload["rank"],
        payload["size"],
        payload["rank"],
        supervised=True,
        pulse=Path(payload["pulse"]),
        stack=Path(payload["stack"]),
        keys=Path(payload["keys"]),
    )
    orders = Orders(on_lost=break_generation).listen(descriptor, on_end=_end)
    job = Job.from_json(payload)
    return run_worker(
        job,
        arguments=arguments,
        report=Report(descriptor),
        orders=orders,
        make_writes=make_writes,
    )


def _end() -> None:
    """End at once, as by kill -9: the supervisor is gone, and another may go on with the run."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_worker(
    job: Job,
    *,
    arguments: WorkerArguments,
    report: Report,
    orders: Orders | None = None,
    make_writes: MakesWrites | None = None,
) -> int:
    """Train as this worker; every failure becomes one message and an exit status."""
    orders = orders or Orders()
    known: _Known = {"report": report, "orders": orders, "make_writes": make_writes}
    signal.signal(signal.SIGTERM, lambda *_: orders.stop.set())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # the fork server blocks it
    if arguments.stack is not None:
        stack = os.open(arguments.stack, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    try:
        if job.decision.workers == "threads" and job.decision.layout.workers > 1:
            _run_threads(job, arguments=arguments, known=known)
        else:
            _run_process(job, arguments=arguments, known=known)
    except Stopped as error:
        report.say("stopped", text=str(error))
        return error.exit_status
    except BaseException as error:
        return report_failure(error, report=report, rank=arguments.rank)
    finally:
        sys.stdout.flush()
    report.say("ended", rank=arguments.rank)
    return 0


def report_failure(error: BaseException, *, report: Report, rank: int) -> int:
    """Report what ended a worker, a person's mistake apart from ours; returns its exit status."""
    full = disk_problem(error) if isinstance(error, OSError) else None
    if isinstance(error, UserError) or full is not None:
        name = type(error).__name__
        report.say("error", user=True, type=name, text=full or str(error), rank=rank)
        return UserError.exit_status
    origin = error.__cause__ or error  # that of a thread comes wrapped
    report.say(
        "error",
        user=False,
        text=f"{type(error).__name__}: {error}",
        trace=traceback.format_exc(),
        rank=rank,
        cause=not isinstance(origin, PeersLost | WorkerError),
        place=_place_of(origin),
        out_of_memory=out_of_memory(error),
    )
    return getattr(error, "exit_status", 1)


def _place_of(error: BaseException) -> str:
    """Type and message of an error, and the innermost line of shoal's or the user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    at = f"{own[-1].filename}:{own[-1].lineno}" if own else "no line"
    return f"{type(error).__name__}: {error} ({at})"


def _run_process(job: Job, *, arguments: WorkerArguments, known: _Known) -> None:
    device = choose_device(job.recipe.launch.device, local_rank=arguments.local_rank)
    threads = job.decision.threads_per_worker
    worker = WorkerInfo(arguments.rank, arguments.size, device, threads)
    start_worker(worker, seed=job.recipe.seed, exact=job.recipe.train.exact)
    group = ProcessGroup(pulse=Pulse(arguments.pulse, slot=arguments.rank))
    try:
        train(
            job,
            group=group,
            worker=worker,
            **known,
            supervised=arguments.supervised and job.score is None,
            keys=None if arguments.keys is None else Keys.read(arguments.keys),
        )
    finally:
        stop_process_group()


def _run_threads(job: Job, *, arguments: WorkerArguments, known: _Known) -> None:
    """One thread per replica; the first failure ends them all, and is the one that is raised."""
    size = job.decision.layout.workers
    meeting = Meeting(size, timeout_seconds=TIMEOUT_SECONDS)
    failures: list[tuple[int, BaseException]] = []
    device = torch.device("cpu")

    def body(rank: int) -> None:
        worker = WorkerInfo(rank, size, device, job.decision.threads_per_worker)
        group: Group = ThreadGroup(meeting, rank=rank, pulse=Pulse(arguments.pulse, slot=rank))
        try:
            start_worker(worker, seed=job.recipe.seed)
            train(job, group=group, worker=worker, **known)
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
