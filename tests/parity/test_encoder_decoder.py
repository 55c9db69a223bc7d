"""T5 in every layout that it can be cut into is one worker's run, by the product's own loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from families import GRADIENT, LOSS, Case, matrix, recipe_of
from shoal.launch import supervise
from shoal.launch.pool import WorkerPool
from shoal.layout import Layout
from shoal.prove.matrix import Matrix


def compared(cases: list[Case], *, pool: WorkerPool, folder: Path) -> None:
    t5 = Matrix(recipe_of("t5", folder), out=folder / "runs", pool=pool)
    for case in cases:
        found = t5.compare(case.overrides)
        assert found.begins_equal and found.loss < LOSS, (case, found)
        assert found.gradient < GRADIENT, (case, found)


def test_a_sharded_layout(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "TARGET", "seq2seq:run")
    compared([Case("t5", Layout(shard=2), "optimizer")], pool=pool, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_layout(pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "TARGET", "seq2seq:run")
    compared(matrix("t5"), pool=pool, folder=tmp_path)
