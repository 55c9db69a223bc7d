"""Workers started by exec (as on macOS) give the same digits as forked ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.launch.pool import WorkerPool
from tiny import Bench


@pytest.mark.slow
def test_exec_equals_fork(bench: Bench, tmp_path: Path) -> None:
    wanted = bench.run("parallel.replicate=2", "train.steps=3", "train.evaluate_every_steps=0")
    with WorkerPool(start_method="exec") as pool:
        other = Bench(tmp_path, pool=pool)
        found = other.run("parallel.replicate=2", "train.steps=3", "train.evaluate_every_steps=0")
    assert len(found.losses) == 3
    assert found.losses == wanted.losses
