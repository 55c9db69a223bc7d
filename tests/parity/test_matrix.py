"""Every family, cut along shard or tensor, replicated and mixed, is one worker's run.

By the product's own loop (prove/matrix.py). A choice runs always; the whole matrix is slow, about a
minute a family on two cores. `scripts/parity_matrix.py` runs the same list and writes
docs/evidence/parity.md with the figures.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from families import FAMILIES, GRADIENT, LOSS, Case, matrix, recipe_of
from shoal.launch.pool import WorkerPool
from shoal.layout import Layout
from shoal.prove.matrix import Apart, Matrix

Compare = Callable[..., Apart]


@pytest.fixture(scope="module")
def compare(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Compare:
    """How far a case is from one worker of its family."""
    folder = Path(tmp_path_factory.mktemp("matrix"))

    @cache
    def of(family: str) -> Matrix:
        recipe = recipe_of(family, folder / family)
        return Matrix(recipe, out=folder / family / "runs", pool=pool)

    return lambda case, **more: of(case.family).compare(case.overrides, **more)


CHOICE = [
    Case("llama", Layout(shard=2, tensor=2)),
    Case("mistral", Layout(shard=2), "gradients", ("parallel.shard.offload=true",)),
    Case("qwen3", Layout(tensor=4)),
    Case("gemma3_text", Layout(tensor=2)),
    Case("phi3", Layout(shard=2, tensor=2), "gradients", ("parallel.recompute=selective",)),
    Case("gpt2", Layout(replicate=2, shard=2, tensor=2)),
    Case("bert", Layout(tensor=2)),
    Case("vit", Layout(shard=2)),
]


def assert_equal(found: Apart) -> None:
    assert found.begins_equal, found
    assert found.loss < LOSS and found.norm < 1e-4, found
    assert found.gradient < GRADIENT, found


@pytest.mark.quick(2)
@pytest.mark.parametrize("case", CHOICE, ids=lambda case: f"{case.family}-{case.layout}")
def test_a_layout_is_one_workers_run(case: Case, compare: Compare) -> None:
    assert_equal(compare(case))


@pytest.mark.quick(1)
@pytest.mark.parametrize("mistake", ["no-reduction", "double-reduction", "missing-partial"])
def test_a_planted_mistake_is_seen(mistake: str, compare: Compare) -> None:
    """The sum of partial gradients left out, made twice, or left out for the norms only."""
    found = compare(Case("qwen3", Layout(tensor=2)), mistake=mistake)
    assert found.gradient > 0.4, found
    assert "norm" in found.where


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_matrix(family: str, compare: Compare) -> None:
    for case in matrix(family):
        found = compare(case)
        assert found.begins_equal, (case, found)
        assert found.loss < LOSS and found.gradient < GRADIENT, (case, found)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "case",
    [
        Case("llama", Layout(shard=2, tensor=2), more=("parallel.compile=true",)),
        Case(
            "gpt2",
            Layout(tensor=2),
            more=("parallel.compile=true", "parallel.recompute=full"),
        ),
    ],
    ids=lambda case: case.family,
)
def test_compiled_blocks(case: Case, compare: Compare) -> None:
    assert_equal(compare(case))
