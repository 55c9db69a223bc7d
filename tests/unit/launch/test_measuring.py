"""A worker that measures: its failures are told."""

from __future__ import annotations

import io
import time

import pytest

from shoal.errors import WorkerError
from shoal.launch.measuring import measuring_job
from shoal.launch.pool import WorkerPool
from shoal.observe.console import Console


def test_a_measuring_worker_that_is_killed_ends_the_job(pool: WorkerPool) -> None:
    console = Console(out=io.StringIO())
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"was killed \(SIGKILL\) while it measured"):
        measuring_job("lame_worker:run", {"rank": 1}, pool=pool, console=console)
    assert time.monotonic() - began < 20


def test_an_error_of_a_measuring_worker_is_told(pool: WorkerPool) -> None:
    console = Console(out=io.StringIO())
    with pytest.raises(WorkerError, match="worker 0: KeyError: 'device'"):
        measuring_job(
            "shoal.engine.measure:run_formats", {"threads": 1}, pool=pool, console=console
        )
