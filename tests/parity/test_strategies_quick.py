"""Every family cut along shard or tensor gives one worker's losses and gradients: a quick choice.

The whole matrix is in test_strategies_matrix.py (slow), its figures in docs/evidence/parity.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.launch.pool import WorkerPool
from shoal.layout import Layout
from strategies import GRADIENT, LOSS, Job, Strategies


@pytest.fixture(scope="session")
def strategies(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Strategies:
    return Strategies(pool, Path(tmp_path_factory.mktemp("strategies")))


CHOICE = [
    Job("llama", Layout(shard=2, tensor=2)),
    Job("qwen2", Layout(tensor=2), recompute="full"),
    Job("qwen3", Layout(tensor=4)),
    Job("mistral", Layout(shard=2), shard_level="gradients", offload=True),
    Job("gemma2", Layout(tensor=2)),
    Job("gemma3_text", Layout(tensor=2)),
    Job("phi3", Layout(shard=2, tensor=2), shard_level="gradients", recompute="selective"),
    Job("granite", Layout(tensor=2)),
    Job("gpt2", Layout(replicate=2, shard=2, tensor=2)),
    Job("gpt_neox", Layout(tensor=2)),
    Job("bert", Layout(tensor=2)),
    Job("roberta", Layout(tensor=2)),
    Job("vit", Layout(shard=2)),
    Job("t5", Layout(shard=2), shard_level="optimizer"),
]


@pytest.mark.parametrize("job", CHOICE, ids=lambda job: f"{job.family}-{job.layout}")
def test_a_cut_model_is_one_workers(job: Job, strategies: Strategies) -> None:
    found = strategies.compare(job)
    assert found.loss < LOSS and found.norm < 1e-4, found
    assert found.gradient < GRADIENT, found
    assert found.pieces_cover, "the ranks' boxes do not hold every element exactly once"


@pytest.mark.parametrize("fault", ["removed", "doubled", "missing-partial"])
def test_a_planted_fault_is_seen(fault: str, strategies: Strategies) -> None:
    """The sum of partial gradients left out, made twice, or left out for the norms only."""
    found = strategies.compare(Job("qwen3", Layout(tensor=2), fault=fault, steps=1))
    assert found.gradient > 0.4, found
    assert "norm" in found.where
    # the loss of the first step knows nothing of it: only gradients by name do
    assert found.loss < LOSS
