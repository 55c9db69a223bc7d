"""One seed, one loss curve, when a replica is cut: shard, tensor and mixes, through the engine."""

from __future__ import annotations

import pytest

from parity.test_replicas import FROZEN, GPT2, PADDED, SHORT, assert_same_curve
from tiny import Bench

LAYOUTS = {
    "shard 2": ("parallel.shard=2",),
    "tensor 2": ("parallel.tensor=2",),
    "shard 2 x tensor 2": ("parallel.shard=2", "parallel.tensor=2"),
    "replicate 2 x shard 2": ("parallel.replicate=2", "parallel.shard=2"),
    "gradients": ("parallel.shard={degree: 2, level: gradients}", "train.micro_batch_samples=2"),
    "optimizer": ("parallel.shard={degree: 2, level: optimizer}", "train.micro_batch_samples=2"),
    "offload": ("parallel.shard={degree: 2, offload: true}",),
    "recompute": ("parallel.tensor=2", "parallel.recompute=full"),
    "selective": ("parallel.shard=2", "parallel.recompute=selective"),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_cut_replica_follows_one_worker(bench: Bench, layout: tuple[str, ...]) -> None:
    found = bench.run(*layout, *SHORT)
    assert_same_curve(found, bench.run(*SHORT))


@pytest.mark.parametrize("change", [PADDED, GPT2, FROZEN], ids=["padded", "gpt2-dropout", "frozen"])
def test_other_recipes_when_cut(bench: Bench, change: tuple[str, ...]) -> None:
    change = (*SHORT, *change)
    layout = ("parallel.replicate=1", "parallel.shard=2", "parallel.tensor=2")
    assert_same_curve(bench.run(*layout, *change), bench.run(*change))
