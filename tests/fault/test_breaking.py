"""No rank of a broken generation stays in a collective, whatever went over its connections then.

gloo (torch 2.13) forgets who waits for what it sends or receives just then, until its time-out.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.launch.pool import WorkerPool
from workers import run_workers

TARGET = "fault.breaking:run"


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("numel", [1000, 1_000_000])
def test_who_is_told_leaves(pool: WorkerPool, tmp_path: Path, size: int, numel: int) -> None:
    told = {"told": list(range(size)), "rounds": 40, "seed": numel}
    payload = {"folder": str(tmp_path), "size": size, "numel": numel, **told}
    assert max(run_workers(pool, TARGET, payload, size=size)) < 2


@pytest.mark.parametrize("numel", [1000, 1_000_000])
def test_who_is_not_told_leaves_after_the_others(
    pool: WorkerPool, tmp_path: Path, numel: int
) -> None:
    payload = {"folder": str(tmp_path), "size": 2, "numel": numel, "told": [0], "rounds": 3}
    assert max(run_workers(pool, TARGET, {**payload, "seed": numel}, size=2)) < 5


@pytest.mark.parametrize("seed", range(8))
def test_who_is_left_by_a_death_leaves(pool: WorkerPool, tmp_path: Path, seed: int) -> None:
    payload = {"folder": str(tmp_path), "size": 3, "numel": 1000, "told": [], "rounds": 1}
    found = run_workers(pool, TARGET, {**payload, "dies": True, "seed": seed}, size=3)
    assert len(found) == 2 and max(found) < 3
