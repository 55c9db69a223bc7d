"""How a replica is cut: as the recipe says, unless the plan has chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shoal.config.load import load_recipe
from shoal.engine import replica as replicas
from shoal.engine.decision import Decision
from shoal.layout import Layout
from shoal.models.huggingface import read_config
from shoal.parallel.apply import Settings
from shoal.parallel.mesh import Mesh
from unit.models.tiny_models import SETTINGS

GIVEN = ["parallel={shard: {degree: 2, level: gradients, offload: true}, recompute: selective}"]
BY_RECIPE = Decision(Layout(), "processes", 1, 1, "float32", "a test")


def built(recipe_words: list[str]) -> tuple[replicas.Replica, object]:
    recipe = load_recipe("quickstart", recipe_words)
    config = read_config(architecture="llama", settings=SETTINGS["llama"], vocabulary_size=64)
    found = replicas.build_replica(recipe, config=config, auto_class="AutoModelForCausalLM")
    return found, recipe


def test_the_plan_chooses_what_the_recipe_leaves_open(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Settings] = []
    monkeypatch.setattr(
        replicas, "apply", lambda model, anatomy, mesh, settings: told.append(settings)
    )
    chosen = replace(BY_RECIPE, shard_level="optimizer", recompute="full")
    for decision in (BY_RECIPE, chosen):
        found, recipe = built(GIVEN)
        mesh = Mesh.alone(torch.device("cpu"))
        replicas.cut(found, recipe, mesh=mesh, decision=decision)
    by_recipe, by_plan = told
    assert (by_recipe.shard_level, by_recipe.recompute) == ("gradients", "selective")
    assert (by_plan.shard_level, by_plan.recompute) == ("optimizer", "full")
    assert by_recipe.offload and by_plan.offload


@pytest.mark.parametrize("recompute", [None, "full"])
def test_blocks_compute_again_when_the_plan_says_so(recompute: str | None) -> None:
    found, recipe = built([])
    decision = replace(BY_RECIPE, recompute=recompute)
    replicas.cut(found, recipe, mesh=Mesh.alone(torch.device("cpu")), decision=decision)
    first = found.model.get_submodule(found.anatomy.blocks)[0]
    assert ("forward" in vars(first)) == (recompute == "full"), "the instance's own forward"
