"""Experts spread over ranks are one worker's experts: by the product's own loop.

A few always; every family, degree and mix is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from families import GRADIENT, LOSS, Case, recipe_of
from shoal.errors import ConfigError, UserError
from shoal.launch.pool import WorkerPool
from shoal.layout import Layout
from shoal.observe.events import read_lines
from shoal.prove.matrix import Apart, Matrix
from shoal.prove.parity import prove
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
    Case("deepseek_v2", Layout(shard=2, tensor=2, expert=2)),
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
    ),
    *(
        Case(family, layout)
        for family in MIXTURES
        for layout in (
            Layout(tensor=2),
            Layout(tensor=4),
            Layout(shard=2, tensor=2),
            Layout(shard=2, tensor=2, expert=2),
            Layout(replicate=2, shard=2, tensor=2, expert=2),
        )
    ),
    Case("qwen3_moe", Layout(shard=2, expert=2), more=("parallel.recompute=full",)),
    Case("deepseek_v2", Layout(shard=4, expert=2), more=("parallel.recompute=selective",)),
]

BALANCED = ("model.output_router_logits=true", "model.router_aux_loss_coef=0.5")
"""So large that a term counted twice, or over a micro batch, is seen at once."""


@pytest.mark.quick(1)
@pytest.mark.parametrize("layout", ["parallel.expert=2", "parallel.tensor=2"])
def test_the_balance_loss_is_the_same_in_any_layout(
    layout: str, pool: WorkerPool, tmp_path: Path
) -> None:
    recipe = recipe_of("mixtral", tmp_path)
    words = [*BALANCED, "parallel.replicate=1", layout]
    words += ["parallel.shard=2"] if "expert" in layout else []
    found = prove(recipe, words, out=tmp_path / "proof", steps=2, pool=pool, whole=True)
    assert found.proven, str(found)
    prove(
        recipe,
        [*words, "model.balance=off"],
        out=tmp_path / "plain",
        steps=1,
        pool=pool,
        whole=True,
    )
    both = [read_lines(tmp_path / name / "layout/metrics.jsonl")[0] for name in ("proof", "plain")]
    # coefficient x at least the experts of a token: 0.5 x 2
    assert both[0]["loss"] - both[1]["loss"] > 0.99
    assert all(row["dropped_tokens"] == 0 and 1 < row["expert_load"] < 4 for row in both)
    with pytest.raises(ConfigError, match="depends on which rows it has"):
        prove(recipe, [*words, "model.balance=batch"], out=tmp_path / "no", pool=pool)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("mistake", "family", "cause"),
    [
        ("lost-expert", "mixtral", "lost expert gradient: expert 2 of model.layers.0.mlp.experts"),
        ("no-reduction", "qwen2_moe", "missing reduction over tensor"),
        ("same-shards", "deepseek_v2", "identical shards at the start"),
    ],
)
def test_a_planted_mistake_is_caught_and_named(
    mistake: str, family: str, cause: str, pool: WorkerPool, tmp_path: Path
) -> None:
    layout = "tensor=2" if mistake == "no-reduction" else "shard=2"
    words = ["parallel.replicate=1", f"parallel.{layout}"]
    words += [] if mistake == "no-reduction" else ["parallel.expert=2"]
    found = prove(
        recipe_of(family, tmp_path),
        words,
        out=tmp_path / "proof",
        steps=1,
        mistake=mistake,
        pool=pool,
        whole=True,
    )
    assert not found.proven
    assert found.cause is not None and cause in found.cause, found.cause


def test_a_mistake_with_experts_needs_experts(pool: WorkerPool, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="spreads no experts"):
        prove(
            recipe_of("mixtral", tmp_path),
            ["parallel.replicate=1", "parallel.shard=2"],
            out=tmp_path / "proof",
            steps=1,
            mistake="lost-expert",
            pool=pool,
        )


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.family}-{case.layout}-{case.notes}".replace(" ", "")
)
def test_spread_experts_are_one_workers(case: Case, compare: Compare) -> None:
    found = compare(case)
    assert found.begins_equal, found
    assert found.loss < LOSS and found.norm < 1e-4, found
    assert found.gradient < GRADIENT, found


@pytest.mark.parametrize(
    ("family", "overrides", "words"),
    [
        ("mixtral", ["parallel.expert=2"], "set it to 1, or parallel.shard to a multiple of 2"),
        ("llama", ["parallel.shard=2", "parallel.expert=2"], "has no experts to spread, got 2"),
        (
            "mixtral",
            ["parallel.shard=8", "parallel.expert=8"],
            "8 does not divide 4 experts\n.*the nearest degree that does is 4",
        ),
        (
            "mixtral",
            ["parallel.shard=2", "parallel.expert=2", "train.exact=true"],
            "whole replicas",
        ),
        ("mixtral", ["parallel.tensor=8"], "degrees that do: 1, 2, 4; the nearest is 4"),
    ],
)
def test_what_cannot_be_is_refused_before_workers_start(
    family: str, overrides: list[str], words: str, pool: WorkerPool, tmp_path: Path
) -> None:
    recipe = recipe_of(family, tmp_path)
    words_of = ["parallel.replicate=1", *overrides]
    with pytest.raises(ConfigError, match=words):
        prove(recipe, words_of, out=tmp_path / "proof", pool=pool, whole=True)
    assert not (tmp_path / "proof" / "one").exists()


@pytest.mark.slow
def test_stages_tell_of_the_experts_of_all_of_them(pool: WorkerPool, tmp_path: Path) -> None:
    """A stage leaves the model's forward half way: what its routers decided counts too."""
    recipe, out = recipe_of("mixtral", tmp_path), tmp_path / "proof"
    found = prove(recipe, ["parallel.pipeline=2"], out=out, steps=2, pool=pool, whole=True)
    assert found.proven, str(found)
    one, two = (read_lines(out / name / "metrics.jsonl") for name in ("one", "layout"))
    assert [row["expert_load"] for row in one] == [row["expert_load"] for row in two]
