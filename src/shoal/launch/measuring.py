"""Measuring jobs in workers of the fork server: of the machine once, of a recipe's best plans."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shoal.environment import usable_cores, usable_memory_bytes
from shoal.errors import UserError, WorkerError
from shoal.launch.attempt import Attempt
from shoal.launch.deaths import Death, death_of
from shoal.launch.pool import WorkerPool
from shoal.observe.console import Console
from shoal.plan.calibrate import read_run
from shoal.plan.measurements import (
    Measurements,
    condition_from,
    load_measurements,
    machine_name,
    measurements_path,
    save_measurements,
)


def measuring_job(
    target: str, payload: dict[str, Any], *, size: int, pool: WorkerPool, console: Console
) -> dict[str, Any]:
    """What rank 0 of a job of `size` measuring workers reports. Raises the job's failure."""
    ordered_at = time.perf_counter()
    begun_seconds: list[float] = []
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        store = str(Path(folder) / "store")
        whole = {**payload, "size": size, "store": store}
        workers = [pool.start(target, {**whole, "rank": rank}) for rank in range(size)]
        attempt = Attempt(console)
        found: dict[str, Any] | None = None
        lost: Death | None = None
        while any(worker.status is None for worker in workers):
            for worker, message in pool.events(timeout_seconds=1.0):
                if worker not in workers:
                    continue
                if message is None:
                    if worker.status is not None and worker.status < 0:
                        lost = lost or _death(workers.index(worker), status=worker.status)
                elif message["kind"] == "measured":
                    found = message
                elif message["kind"] == "begun":
                    begun_seconds.append(time.perf_counter() - ordered_at)
                else:
                    attempt.hear(message)
            if attempt.errors or lost is not None:
                pool.kill(workers)  # the others would wait for it
    if lost is not None and not attempt.errors:
        raise WorkerError(f"{lost.text} while it measured this machine; start the run again")
    if found is None:
        raise attempt.failure()
    return {**found, "start_seconds": max(begun_seconds, default=0.0)}


def _death(rank: int, *, status: int) -> Death:
    where = "measuring"
    return death_of(
        rank=rank, status=status, step=0, where=where, error=None, stuck=None, ran_out=False
    )


def measure_machine(
    *, pool: WorkerPool, console: Console, short_for: str | None = None
) -> Measurements:
    """Measure this machine and keep it: under a minute.

    `short_for` (the `precision.compute` of a recipe) takes about ten seconds: products in both
    formats, fewer of all, and blocks in the format named, or in the fastest for "auto".

    A machine that was measured before keeps what it learned from runs. Raises WorkerError.
    """
    while pool.ready_seconds is None:  # or the imports would count as a worker's start
        for _ in pool.events(timeout_seconds=1.0):
            pass
    target, cores = "shoal.engine.calibrate:run", usable_cores()
    payload = {"short_for": short_for, "only_sums": False}
    found = measuring_job(target, payload, size=cores, pool=pool, console=console)
    reduces = list(found["reduces"])
    for ranks in [] if short_for else sorted({2, 2 * cores} - {cores, 1}):
        payload["only_sums"] = True
        more = measuring_job(target, payload, size=ranks, pool=pool, console=console)
        reduces += more["reduces"]
    measured = Measurements(
        name=machine_name(),
        cores=cores,
        memory_bytes=float(usable_memory_bytes() or 0),
        conditions=tuple(condition_from(each) for each in found["conditions"]),
        reduces=tuple((str(k), int(n), float(b), float(s)) for k, n, b, s in reduces),
        start_seconds=found["start_seconds"],
        is_short=short_for is not None,
    )
    path = measurements_path()
    known = _known(path)
    measured = replace(measured, runs=known.runs if known else ())
    save_measurements(measured, path)
    return measured


def _known(path: Path) -> Measurements | None:
    """What was measured before, unless it cannot be read."""
    try:
        return load_measurements(path) if path.is_file() else None
    except UserError:
        return None


def measured_before() -> Measurements | None:
    """This machine's measurements, or None where there are none that can be used."""
    return _known(measurements_path())


def learn_from(runs: Sequence[Path]) -> Measurements:
    """Fold finished runs into this machine's measurements; a run counts once.

    Raises UserError for a machine that was never measured, and for a run without an outcome.
    """
    path = measurements_path()
    if not path.is_file():
        raise UserError(
            "this machine has not been measured: run shoal plan --calibrate first, then give runs"
        )
    measured = load_measurements(path)
    seen = {each.run: each for each in (*measured.runs, *(read_run(run) for run in runs))}
    measured = replace(measured, runs=tuple(seen.values()))
    save_measurements(measured, path)
    return measured
