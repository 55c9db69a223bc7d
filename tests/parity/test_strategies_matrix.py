"""Every family x shard x level x tensor, with replicas, up to 8 workers: equal to one worker.

Slow: about a minute per family on two cores. `scripts/parity.py` runs the same list and writes
docs/evidence/parity.md with the figures.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.launch.pool import WorkerPool
from shoal.layout import Layout
from strategies import GRADIENT, LOSS, Job, Strategies, matrix
from unit.models.tiny_models import SETTINGS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="session")
def strategies(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Strategies:
    return Strategies(pool, Path(tmp_path_factory.mktemp("matrix")))


@pytest.mark.parametrize("family", [each for each in SETTINGS if each != "cohere"])
def test_the_matrix(family: str, strategies: Strategies) -> None:
    for job in matrix(family):
        found = strategies.compare(job)
        assert found.loss < LOSS and found.gradient < GRADIENT, (job, found)
        assert found.pieces_cover, job


@pytest.mark.parametrize(
    "job",
    [
        Job("llama", Layout(shard=2, tensor=2), compile=True),
        Job("gpt2", Layout(tensor=2), compile=True, recompute="full"),
    ],
    ids=lambda job: job.family,
)
def test_compiled_blocks(job: Job, strategies: Strategies) -> None:
    found = strategies.compare(job)
    assert found.loss < LOSS and found.gradient < GRADIENT, found
