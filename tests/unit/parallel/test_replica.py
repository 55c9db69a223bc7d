"""How a replica is cut: as the recipe says, unless the plan has chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shoal.config.load import load_recipe
from shoal.engine.build import strategy_settings
from shoal.engine.decision import Decision
from shoal.layout import Layout
from shoal.models.huggingface import read_config
from shoal.parallel.mesh import Mesh
from shoal.parallel.model import ModelSettings
from shoal.parallel.replica import build_replica, cut
from unit.models.tiny_models import SETTINGS

GIVEN = ["parallel={shard: {degree: 2, level: gradients, offload: true}, recompute: selective}"]
BY_RECIPE = Decision(Layout(), "processes", 1, 1, "float32", "a test")


def test_the_plan_chooses_what_the_recipe_leaves_open() -> None:
    recipe = load_recipe("quickstart", GIVEN)
    by_recipe = strategy_settings(recipe, BY_RECIPE)
    by_plan = strategy_settings(
        recipe, replace(BY_RECIPE, shard_level="optimizer", recompute="full")
    )
    assert (by_recipe.shard_level, by_recipe.recompute) == ("gradients", "selective")
    assert (by_plan.shard_level, by_plan.recompute) == ("optimizer", "full")
    assert by_recipe.offload and by_plan.offload


@pytest.mark.parametrize("family", ["cohere", "llama", "gpt2"])
def test_muon_gets_the_projections_of_blocks_alone(family: str) -> None:
    """By dims alone it would take cohere's norm of each head, which has two."""
    more = {"use_qk_norm": True} if family == "cohere" else {"tie_word_embeddings": False}
    settings = {**SETTINGS[family], **more}
    config = read_config(architecture=family, settings=settings, vocabulary_size=64)
    found = build_replica(ModelSettings(config, "AutoModelForCausalLM", seed=0, dropout="off"))
    inside = {n for n in found.shapes if n.startswith(found.anatomy.blocks + ".")}
    expected = {n for n in inside if n.endswith("weight") and "norm" not in n and ".ln_" not in n}
    assert found.matrices == expected and len(expected) == 2 * (4 if family == "gpt2" else 7)
    flat = [n for n in inside - expected if len(found.shapes[n]) == 2]
    assert bool(flat) == (family == "cohere")
    assert found.decayed - found.matrices <= {"lm_head.weight"}


@pytest.mark.parametrize("recompute", [None, "full"])
def test_blocks_compute_again_when_the_plan_says_so(recompute: str | None) -> None:
    recipe = load_recipe("quickstart")
    config = read_config(architecture="llama", settings=SETTINGS["llama"], vocabulary_size=64)
    found = build_replica(ModelSettings(config, "AutoModelForCausalLM", seed=0, dropout="off"))
    settings = strategy_settings(recipe, replace(BY_RECIPE, recompute=recompute))
    cut(found, mesh=Mesh.alone(torch.device("cpu")), settings=settings)
    first = found.model.get_submodule(found.anatomy.blocks)[0]
    assert ("forward" in vars(first)) == (recompute == "full"), "the instance's own forward"
