"""Rows cut along the sequence, alone and mixed, are one worker's run.

A choice; every decoder family in 2 and 4, both ways and mixed, is in test_matrix.py.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from families import Case, recipe_of
from parity.test_matrix import Compare, assert_equal
from parity.test_replicas import SHORT, assert_same_curve
from shoal.errors import ConfigError
from shoal.launch.pool import WorkerPool
from shoal.layout import Layout
from shoal.legal.rules import CONTEXT_KINDS
from shoal.prove.matrix import Apart, Matrix
from shoal.prove.parity import prove
from tiny import Bench

MODEL = {
    "kind": "config",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def compare(pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Compare:
    """How far a case is from one worker of its family."""
    folder = Path(tmp_path_factory.mktemp("context"))

    @cache
    def of(family: str) -> Matrix:
        recipe = recipe_of(family, folder / family)
        return Matrix(recipe, out=folder / family / "runs", pool=pool)

    def found(case: Case, **more: str) -> Apart:
        return of(case.family).compare(case.overrides, **more)

    return found


CHOICE = [
    Case("gpt2", Layout(context=2)),
    Case("gemma3_text", Layout(context=2), kind="ulysses"),
    Case("llama", Layout(context=2, shard=2), "optimizer"),
    Case("qwen3", Layout(context=2, tensor=2), kind="ulysses"),
    Case("mistral", Layout(context=4)),
    Case("llama", Layout(context=2, tensor=2, shard=2)),
    Case("phi3", Layout(context=2, replicate=2), more=("parallel.recompute=full",)),
    Case("gpt2", Layout(context=2, shard=2), more=("parallel.recompute=selective",)),
    Case("gpt2", Layout(context=2, tensor=2, replicate=2), kind="ulysses"),
    Case("gemma2", Layout(context=2, shard=2), "gradients", ("parallel.shard.offload=true",)),
]
"""gpt2: keyed dropout of half a row's tokens."""


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", CHOICE, ids=lambda case: f"{case.family}-{case.layout}")
def test_rows_that_are_cut_are_one_workers(case: Case, compare: Compare) -> None:
    assert_equal(compare(case))


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("mistake", "layout"),
    [
        ("wrong-mask", Layout(context=2)),
        ("no-reduction", Layout(context=2)),
        ("double-reduction", Layout(context=2)),
    ],
)
def test_a_planted_mistake_is_seen(mistake: str, layout: Layout, compare: Compare) -> None:
    """A part with another's mask; the sum over context left out, or made twice."""
    found = compare(Case("llama", layout), mistake=mistake)
    assert found.gradient > 0.1, found


@pytest.mark.parametrize(
    ("overrides", "mistake", "cause"),
    [
        (("parallel.context=2",), "wrong-mask", "wrong mask, or tokens out of order, over context"),
        pytest.param(
            ("parallel.context.kind=ulysses", "parallel.context.degree=2"),
            "no-reduction",
            "missing reduction over context",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("parallel.context=2",),
            "double-reduction",
            "double reduction over context",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_proof_names_it(
    bench: Bench, overrides: tuple[str, ...], mistake: str, cause: str
) -> None:
    found = prove(
        bench.recipe, overrides, out=bench.new_path(), mistake=mistake, pool=bench.pool, steps=2
    )
    assert not found.proven
    assert cause in str(found.cause)


@pytest.mark.quick(1)
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CONTEXT_KINDS)
def test_the_proof_holds(bench: Bench, kind: str, compute: str) -> None:
    """And transformers opens what was saved, and finds the loss of the next step."""
    overrides = (f"parallel.context={{degree: 2, kind: {kind}}}", f"precision.compute={compute}")
    found = prove(bench.recipe, overrides, out=bench.new_path(), pool=bench.pool, steps=2)
    assert found.proven, found
    assert ("opened" in found.largest) == (compute == "float32")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", CONTEXT_KINDS)
def test_compiled_blocks(kind: str, compare: Compare) -> None:
    compiled = ("parallel.compile=true",)
    assert_equal(compare(Case("gpt2", Layout(context=2), more=compiled, kind=kind)))


MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    **MIXTURE,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
EXPERTS: dict[str, dict[str, int]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**MIXTURE, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**MIXTURE, "num_experts": 4},
    "deepseek_v2": LATENT,
}
"""Mixtures of experts; DeepSeek's values are smaller than its keys."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONTEXT_KINDS)
@pytest.mark.parametrize("family", EXPERTS)
def test_mixtures_of_experts(bench: Bench, family: str, kind: str) -> None:
    sizes = {**MODEL, "architecture": family, **EXPERTS[family]}
    change = (*SHORT, f"model={json.dumps(sizes)}")
    found = bench.run(f"parallel.context={{degree: 2, kind: {kind}}}", *change)
    assert_same_curve(found, bench.run(*change))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("parallel.context=3",), "set data.sequence_tokens to 36"),
        (("parallel.context={degree: 4, kind: ulysses}",), "kind to ring, or the degree to 2"),
        (("parallel.context=2", "model.dropout=framework"), "has no key"),
        (("parallel.context=2", "train.exact=true"), "holds for whole replicas and"),
        (("parallel.context=2", "launch.workers=threads"), "threads carry the replicate axis"),
        (("parallel.context={degree: 2, kind: rings}",), "ring"),
        (
            ("parallel.context=2", "task.kind=sequence-classification", "data.packing=false"),
            "not a sum over tokens",
        ),
        (("parallel.context=2", "model.architecture=bert"), "cannot be cut along context"),
        (("parallel.context=2", "model.architecture=mamba"), "no table for the family mamba"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    bench: Bench, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        bench.train(*overrides)
