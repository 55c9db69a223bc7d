"""Exact mode: the same bits in any replicate degree and kind of worker, to the merged weights."""

from __future__ import annotations

import pytest

from tiny import Bench

EXACT = ("train.exact=true", "train.micro_batch_samples=2", "train.steps=12")
MUON = "train.optimizer={kind: muon, learning_rate: 0.02, adamw_learning_rate: 3.0e-3}"
ADAMW = "train.optimizer={kind: adamw, learning_rate: 3.0e-3}"
LAYOUTS = [(2, "processes"), (4, "processes"), (2, "threads"), (4, "threads")]
FORMATS = ["float32", "bfloat16"]
FEW = [
    (2, "processes", "float32", ADAMW),
    (4, "threads", "float32", ADAMW),
    (4, "processes", "bfloat16", ADAMW),
    (2, "threads", "bfloat16", MUON),
    (4, "processes", "float32", MUON),
]
REST = [
    (*layout, compute, optimizer)
    for layout in LAYOUTS
    for compute in FORMATS
    for optimizer in (ADAMW, MUON)
    if (*layout, compute, optimizer) not in FEW
]


def assert_same_bits(bench: Bench, *change: str, degree: int, kind: str) -> None:
    one = bench.run(*change)
    many = bench.run(*change, f"parallel.replicate={degree}", f"launch.workers={kind}")
    assert many.digits == one.digits
    assert many.weights == one.weights


@pytest.mark.quick(2)
@pytest.mark.parametrize(("degree", "kind", "compute", "optimizer"), FEW)
def test_the_same_bits_in_any_layout(
    bench: Bench, degree: int, kind: str, compute: str, optimizer: str
) -> None:
    change = (*EXACT, f"precision.compute={compute}", optimizer)
    assert_same_bits(bench, *change, degree=degree, kind=kind)


@pytest.mark.slow
@pytest.mark.parametrize(("degree", "kind", "compute", "optimizer"), REST)
def test_the_same_bits_in_every_layout(
    bench: Bench, degree: int, kind: str, compute: str, optimizer: str
) -> None:
    change = (*EXACT, f"precision.compute={compute}", optimizer)
    assert_same_bits(bench, *change, degree=degree, kind=kind)


@pytest.mark.quick(1)
@pytest.mark.parametrize("samples", [12, 20])
def test_a_number_of_micro_batches_that_is_no_power_of_two(bench: Bench, samples: int) -> None:
    change = (*EXACT, f"train.global_batch_samples={samples}", "train.steps=4")
    assert_same_bits(bench, *change, degree=2, kind="threads")


def test_the_micro_batch_that_auto_chooses_is_the_same_for_every_degree(bench: Bench) -> None:
    change = ("train.exact=true", "train.micro_batch_samples=auto", "train.steps=4")
    assert_same_bits(bench, *change, degree=4, kind="threads")


def test_exact_follows_the_ordinary_run(bench: Bench) -> None:
    """Another order of the same sums, so within the promise of float32 (see test_replicas)."""
    exact = bench.run(*EXACT, "precision.compute=float32", ADAMW)
    plain = bench.run("train.steps=12", "train.micro_batch_samples=2")
    assert exact.losses == pytest.approx(plain.losses, rel=1e-5)


MIXTRAL = (
    "model={kind: config, architecture: mixtral, hidden_size: 32, intermediate_size: 48,"
    " num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, num_local_experts: 4,"
    " output_router_logits: true, router_aux_loss_coef: 0.1}"
)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("degree", "kind", "compute"),
    [(2, "threads", "float32"), (4, "processes", "bfloat16"), (2, "processes", "float32")],
)
def test_experts_and_their_balance_have_the_same_bits(
    bench: Bench, degree: int, kind: str, compute: str
) -> None:
    """The load of experts is among the digits."""
    change = (*EXACT, "train.steps=4", f"precision.compute={compute}", MIXTRAL)
    assert_same_bits(bench, *change, degree=degree, kind=kind)
    rows = [row for row in bench.run(*change).digits if "loss" in row]
    assert all(1 < row["expert_load"] <= 2 and row["dropped_tokens"] == 0 for row in rows)
