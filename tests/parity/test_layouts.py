"""One seed, one loss curve, when a replica is cut: shard, tensor and mixes, through the engine."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from parity.test_replicas import FROZEN, GPT2, MUON, PADDED, SHORT, assert_same_curve
from tiny import Bench

LAYOUTS = {
    "shard 2": ("parallel.shard=2",),
    "tensor 2": ("parallel.tensor=2",),
    "shard 2 x tensor 2": ("parallel.shard=2", "parallel.tensor=2"),
    "replicate 2 x shard 2": ("parallel.replicate=2", "parallel.shard=2"),
    "context 2": ("parallel.context=2",),
    "gradients": ("parallel.shard={degree: 2, level: gradients}", "train.micro_batch_samples=2"),
    "optimizer": ("parallel.shard={degree: 2, level: optimizer}", "train.micro_batch_samples=2"),
    "offload": ("parallel.shard={degree: 2, offload: true}",),
    "recompute": ("parallel.tensor=2", "parallel.recompute=full"),
    "selective": ("parallel.shard=2", "parallel.recompute=selective"),
}


MORE = {"gradients", "offload", "selective", "replicate 2 x shard 2"}
"""Left to `make test-all`."""


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, id=name, marks=[pytest.mark.slow] if name in MORE else [])
        for name, layout in LAYOUTS.items()
    ],
)
def test_a_cut_replica_follows_one_worker(bench: Bench, layout: tuple[str, ...]) -> None:
    found = bench.run(*layout, *SHORT)
    assert_same_curve(found, bench.run(*SHORT))


def test_blocks_of_queries_are_computed_again(bench: Bench) -> None:
    """bfloat16 on a CPU has a kernel of its own, whose products selective recompute keeps."""
    narrow = ("precision.compute=bfloat16", *SHORT)
    assert bench.run("parallel.recompute=selective", *narrow).losses == bench.run(*narrow).losses


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["parallel.replicate=2", "parallel.shard=2", "parallel.tensor=2"])
def test_compiled_blocks_follow_one_worker(bench: Bench, axis: str) -> None:
    assert_same_curve(bench.run(axis, "parallel.compile=true", *SHORT), bench.run(*SHORT))


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param("shard 2 x tensor 2", marks=pytest.mark.slow),
        "shard 2",
        "tensor 2",
        pytest.param("optimizer", marks=pytest.mark.slow),
    ],
)
def test_muon_works_on_whole_matrices_that_ranks_have_parts_of(bench: Bench, layout: str) -> None:
    change = (*SHORT, *MUON)
    found = bench.run(*LAYOUTS[layout], *change)
    assert_same_curve(found, bench.run(*change), curve=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(PADDED, id="padded", marks=pytest.mark.slow),
        pytest.param(GPT2, id="gpt2-dropout"),
        pytest.param(FROZEN, id="frozen", marks=pytest.mark.slow),
    ],
)
def test_other_recipes_when_cut(bench: Bench, change: tuple[str, ...]) -> None:
    change = (*SHORT, *change)
    layout = ("parallel.replicate=1", "parallel.shard=2", "parallel.tensor=2")
    assert_same_curve(bench.run(*layout, *change), bench.run(*change))


def test_sent_bytes_of_sharding_are_the_formula_s(bench: Bench) -> None:
    """Per micro batch: blocks but the last gathered twice, the rest once; gradients scattered."""
    layout = ("parallel.shard=2", "train.micro_batch_samples=4")
    run = bench.run(*layout, *SHORT)
    weights = load_file(run.path / "model/model.safetensors")
    blocks = sum(each.numel() for name, each in weights.items() if ".layers." in name)
    rest = sum(each.numel() for name, each in weights.items() if ".layers." not in name)
    numbers = {name.split(".layers.")[1].split(".")[0] for name in weights if ".layers." in name}
    again = blocks * (len(numbers) - 1) // len(numbers)
    own = 4 // 2  # bytes of an element of which this rank has every second
    wanted = (
        2 * own * (blocks + again + rest + blocks + rest)
    )  # two micro batches of 4 in a share of 8
    sent = {row["sent_bytes"] for row in run.rows if "loss" in row}
    assert len(sent) == 1
    # beside it: counts, the norm and the losses of the micro batches, a few numbers each
    assert wanted <= sent.pop() <= wanted + 1000


def test_tensor_parallel_traffic_is_counted(bench: Bench) -> None:
    """Activations cross at the borders of every region: more with more rows, nothing alone."""
    sent = bench.run("parallel.tensor=2", *SHORT).rows[-2]["sent_bytes"]
    rows, tokens, hidden = 16, 32, 32
    assert (
        sent > 2 * 2 * 4 * rows * tokens * hidden / 2
    )  # two blocks, forward and backward, at least
