"""The whole measurement of a machine, as `shoal plan --calibrate` takes it."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import pytest

from shoal.environment import usable_cores
from shoal.errors import WorkerError
from shoal.launch.measuring import measure_machine, measuring_job
from shoal.launch.pool import WorkerPool
from shoal.observe.console import Console
from shoal.plan.measurements import load_measurements, measurements_path

pytestmark = pytest.mark.timed


@pytest.mark.slow
def test_the_whole_machine(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every company of workers, both formats, both kinds of block, sums beyond the cores."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    out = io.StringIO()
    measured = measure_machine(pool=pool, console=Console(out=out))
    cores = usable_cores()
    assert load_measurements(measurements_path()) == measured
    assert not measured.is_short and measured.cores == cores
    assert {row[0] for each in measured.conditions for row in each.products} == {"fp32", "bf16"}
    assert {"llama", "gpt2"} <= {row[1] for each in measured.conditions for row in each.blocks}
    assert 2 * cores in {row[1] for row in measured.reduces}
    found = {(each.workers, each.busy, each.threads) for each in measured.conditions}
    assert ("processes", cores, 1) in found
    if cores > 1:
        assert {("threads", cores, 1), ("processes", 1, cores), ("processes", 1, 1)} <= found
    assert "measuring: " in out.getvalue()


def test_a_measuring_worker_that_is_killed_ends_the_job(pool: WorkerPool) -> None:
    console = Console(out=io.StringIO())
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"worker 1 was killed \(SIGKILL\)"):
        measuring_job("lame_worker:run", {}, size=2, pool=pool, console=console)
    assert time.monotonic() - began < 20


def test_an_error_of_a_measuring_worker_is_told(pool: WorkerPool) -> None:
    console = Console(out=io.StringIO())
    payload: dict[str, Any] = {"recipe": {}}
    with pytest.raises(WorkerError, match="worker 0: ValidationError"):
        measuring_job("shoal.engine.measure:run", payload, size=1, pool=pool, console=console)
