"""Experts spread over ranks are one worker's experts: by the product's own loop.

A few always; every family, degree and mix is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from families import GRADIENT, LOSS, Case, recipe_of
from shoal.launch.pool import WorkerPool
from shoal.layout import Layout
from shoal.prove.matrix import Apart, Matrix
from unit.models.tiny_models import MIXTURES

Compare = Callable[..., Apart]


@pytest.fixture(scope="module")
def compare(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Compare:
    """How far a case is from one worker of its family."""
    folder = Path(tmp_path_factory.mktemp("experts"))

    @cache
    def of(family: str) -> Matrix:
        recipe = recipe_of(family, folder / family)
        return Matrix(recipe, out=folder / family / "runs", pool=pool)

    return lambda case, **more: of(case.family).compare(case.overrides, **more)


CASES = [
    Case("mixtral", Layout(shard=2, expert=2)),
    Case("deepseek_v3", Layout(shard=4, expert=2)),
    Case("mixtral", Layout(shard=4, expert=4), "optimizer"),
    Case("qwen2_moe", Layout(replicate=2, shard=2, expert=2), "gradients"),
    *(
        Case(family, layout, level)
        for family in MIXTURES
        for layout, level in [
            (Layout(shard=2, expert=2), "parameters"),
            (Layout(shard=4, expert=2), "gradients"),
            (Layout(shard=4, expert=2), "optimizer"),
            (Layout(shard=4, expert=4), "parameters"),
            (Layout(replicate=2, shard=4, expert=4), "parameters"),
            (Layout(shard=8, expert=4), "parameters"),
        ]
        if family != "mixtral" or layout.expert < 8
    ),
    Case("qwen3_moe", Layout(shard=2, expert=2), more=("parallel.recompute=full",)),
    Case("deepseek_v2", Layout(shard=4, expert=2), more=("parallel.recompute=selective",)),
]


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.family}-{case.layout}-{case.notes}".replace(" ", "")
)
def test_spread_experts_are_one_workers(case: Case, compare: Compare) -> None:
    found = compare(case)
    assert found.begins_equal, found
    assert found.loss < LOSS and found.norm < 1e-4, found
    assert found.gradient < GRADIENT, found
