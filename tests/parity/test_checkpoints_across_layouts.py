"""A checkpoint has no layout: what one saves any other loads, bit for bit, and trains on."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch

from passing_on import KINDS, newest, pass_on
from shoal.boxes import Box, Piece
from shoal.checkpoint.store import Reader, Store
from shoal.data.verify import verify_run
from shoal.engine.export import merge
from tiny import Bench, Run, largest_difference

CURVE = 1e-5
"""float32, as in test_replicas: ten more steps of sums in another order. The promise."""

slow = pytest.mark.slow
LENGTH = ("train.steps=20", "train.evaluate_every_steps=5", "checkpoint.every_steps=5")
HALF = (*LENGTH, "train.stop_after_steps=10")
GPT2 = (
    "model={kind: config, architecture: gpt2, n_embd: 32, n_layer: 2, n_head: 4, n_positions: 64,"
    " embd_pdrop: 0.2, resid_pdrop: 0.2, attn_pdrop: 0.2}",
)
PHI3 = (
    "model={kind: config, architecture: phi3, hidden_size: 32, intermediate_size: 48,"
    " num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, pad_token_id: 0}",
)
MIXTURE = (
    "model={kind: config, architecture: deepseek_v3, hidden_size: 32, intermediate_size: 48,"
    " num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 4, kv_lora_rank: 8,"
    " q_lora_rank: 12, qk_rope_head_dim: 4, qk_nope_head_dim: 6, v_head_dim: 8, pad_token_id: 0,"
    " n_routed_experts: 8, num_experts_per_tok: 2, moe_intermediate_size: 16,"
    " first_k_dense_replace: 1, n_group: 2, topk_group: 1}",
)
FAMILIES = {"llama": (), "gpt2": GPT2, "phi3": PHI3, "deepseek_v3": MIXTURE}
"""gpt2: one tied table, fused qkv of equal parts. phi3: fused qkv of unequal parts, fused gate."""

ONE = ("parallel={replicate: 1}", "launch.workers=processes")


def cut(text: str) -> tuple[str, ...]:
    """Overrides of a layout of processes."""
    return (f"parallel={{{text}}}", "launch.workers=processes", "train.micro_batch_samples=2")


LAYOUTS = {
    "one": ONE,
    "shard 2": cut("shard: 2"),
    "tensor 2": cut("tensor: 2"),
    "shard 2 x tensor 2": cut("shard: 2, tensor: 2"),
    "replicate 2": cut("replicate: 2"),
    "gradients": cut("shard: {degree: 2, level: gradients}"),
    "optimizer": cut("shard: {degree: 4, level: optimizer}"),
    "replicate 2 x shard 2": cut("replicate: 2, shard: 2"),
    "replicate 2 x tensor 2": cut("replicate: 2, tensor: 2"),
    "shard 4": cut("shard: 4"),
    "offload": cut("shard: {degree: 2, offload: true}"),
    "context 2": cut("context: 2"),
    "shard 2 x context 2": cut("shard: 2, context: {degree: 2, kind: ulysses}"),
    "context 2 x tensor 2": cut("context: 2, tensor: 2"),
    "threads": ("parallel={replicate: 4}", "launch.workers=threads", "train.micro_batch_samples=2"),
}
PASSED_ON = [name for name in LAYOUTS if name != "threads"]
LAYOUTS |= {
    "expert 2": cut("shard: 2, expert: 2"),
    "shard 4 x expert 2": cut("shard: 4, expert: 2"),
    "shard 4 x expert 4": cut("shard: {degree: 4, level: optimizer}, expert: 4"),
    "tensor 2 x expert 2": cut("shard: 2, tensor: 2, expert: 2"),
    "replicate 2 x expert 2": cut("replicate: 2, shard: 2, expert: 2"),
}
SPREAD = ["expert 2", "tensor 2 x expert 2", "shard 4 x expert 2", "tensor 2"]
"""Of the last dims and the first, of rows over ranks with the same experts, and of none."""


def assert_equal(found: Reader, wanted: Reader) -> None:
    """The same names, shapes and bits, of every kind."""
    for kind in KINDS:
        assert sorted(found.names(kind)) == sorted(wanted.names(kind)) != []
        for name in wanted.names(kind):
            ours, theirs = (reader.read(name, kind=kind) for reader in (found, wanted))
            assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32)), (kind, name)


def files_of(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("family", "names"),
    [
        (
            "llama",
            [
                "tensor 2",
                "shard 2 x context 2",
                "context 2",
                "shard 2 x tensor 2",
                "replicate 2 x shard 2",
            ],
        ),
        ("gpt2", ["shard 2 x tensor 2", "replicate 2 x tensor 2"]),
        ("phi3", ["shard 2 x tensor 2", "replicate 2 x tensor 2"]),
        ("deepseek_v3", SPREAD),
        pytest.param("llama", PASSED_ON, marks=slow),
        pytest.param("gpt2", PASSED_ON, marks=slow),
        pytest.param("phi3", PASSED_ON, marks=slow),
        pytest.param("deepseek_v3", [n for n in LAYOUTS if n != "threads"], marks=slow),
    ],
    ids=lambda value: value if isinstance(value, str) else str(len(value)),
)
def test_passed_on_through_layouts_without_a_step(
    bench: Bench, tmp_path: Path, family: str, names: list[str]
) -> None:
    """Each layout loads what the one before it saved, so an error of any would reach the end."""
    half = bench.run(*HALF, *FAMILIES[family])
    first = reader = newest(half)
    merge(first, out=tmp_path / "first")
    for number, name in enumerate(names):
        reader = pass_on(half, reader, LAYOUTS[name], pool=bench.pool)
        assert_equal(reader, first)
        merge(reader, out=tmp_path / str(number))
        assert files_of(tmp_path / str(number)) == files_of(tmp_path / "first"), name


PAIRS = [
    pytest.param("context 2", "shard 2 x context 2", marks=slow),
    ("shard 2", "tensor 2"),
    pytest.param("tensor 2", "replicate 2 x shard 2", marks=slow),
    ("threads", "shard 2 x tensor 2"),
    pytest.param("tensor 2", "shard 2", marks=slow),
    pytest.param("context 2 x tensor 2", "one", marks=slow),
    pytest.param("shard 2", "context 2 x tensor 2", marks=slow),
    pytest.param("shard 2", "shard 4", marks=slow),
    pytest.param("shard 4", "shard 2", marks=slow),
    pytest.param("replicate 2", "shard 2", marks=slow),
    pytest.param("shard 2", "replicate 2", marks=slow),
    pytest.param("shard 2 x tensor 2", "one", marks=slow),
    pytest.param("one", "shard 2 x tensor 2", marks=slow),
    pytest.param("shard 2 x tensor 2", "threads", marks=slow),
    pytest.param("replicate 2 x tensor 2", "optimizer", marks=slow),
    pytest.param("gradients", "offload", marks=slow),
    pytest.param("optimizer", "replicate 2 x tensor 2", marks=slow),
]


def resumed(bench: Bench, first: str, second: str, family: str = "llama") -> Run:
    """Ten steps in one layout, and the other ten in another."""
    half = bench.run(*HALF, *FAMILIES[family], *LAYOUTS[first])
    copy = Run(bench.new_path())
    shutil.copytree(half.path, copy.path)
    return bench.resume(copy, *LAYOUTS[second])


def assert_goes_on(found: Run, straight: Run) -> None:
    assert len(found.losses) == 20
    assert largest_difference(found.losses, straight.losses) < CURVE
    ours, theirs = ([row["evaluation_loss"] for row in r.evaluations] for r in (found, straight))
    assert largest_difference(ours, theirs) < CURVE
    report = verify_run(found.path)
    assert (report.problems, report.num_steps, report.num_restarts) == ([], 20, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("expert 2", "one"),
        ("one", "shard 4 x expert 2"),
        ("shard 4 x expert 4", "tensor 2 x expert 2"),
        ("tensor 2", "expert 2"),
        ("replicate 2 x expert 2", "shard 2"),
    ],
)
def test_experts_are_resumed_in_another_layout(bench: Bench, first: str, second: str) -> None:
    """Also the load of experts goes on as it was."""
    found, straight = resumed(bench, first, second, "deepseek_v3"), bench.run(*LENGTH, *MIXTURE)
    assert_goes_on(found, straight)
    loads = [
        [r["expert_load"] for r in run.rows if "expert_load" in r] for run in (found, straight)
    ]
    assert loads[0] == loads[1] and len(loads[0]) == 20


@pytest.mark.quick(1)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_resumed_in_another_layout(bench: Bench, first: str, second: str) -> None:
    assert_goes_on(resumed(bench, first, second), bench.run(*LENGTH))


@pytest.mark.parametrize(
    ("family", "first", "second"),
    [
        pytest.param("gpt2", "tensor 2", "shard 2 x tensor 2", marks=slow),
        pytest.param("phi3", "shard 2 x tensor 2", "tensor 2", marks=slow),
        pytest.param("gpt2", "shard 4", "one", marks=slow),
        pytest.param("phi3", "one", "replicate 2 x tensor 2", marks=slow),
    ],
)
def test_fused_and_tied_weights_go_on(bench: Bench, family: str, first: str, second: str) -> None:
    found = resumed(bench, first, second, family)
    assert_goes_on(found, bench.run(*LENGTH, *FAMILIES[family]))


@pytest.mark.parametrize("kind", KINDS)
def test_one_bit_would_be_seen(bench: Bench, tmp_path: Path, kind: str) -> None:
    """The comparison above can fail: the same checkpoint with one bit of one tensor turned."""
    reader = newest(bench.run(*HALF))
    pieces = [
        Piece(name, each, reader.shape(name, kind=each), Box.whole(tensor.shape), tensor)
        for each in KINDS
        for name in reader.names(each)
        for tensor in [reader.read(name, kind=each).clone()]
    ]
    next(p for p in pieces if p.kind == kind).tensor.view(-1).view(torch.int32)[5] ^= 1
    store = Store(tmp_path)
    store.begin(10)
    part = store.write_part(10, rank=0, pieces=pieces)
    store.publish(10, parts=[part], state=reader.state, keep=1)
    with pytest.raises(AssertionError, match=kind):
        assert_equal(store.open(10), reader)
