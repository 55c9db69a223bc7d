"""Layouts that cannot run are refused before a worker starts: the reason, and what can run."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.config.load import load_recipe
from shoal.config.recipe import Recipe
from shoal.engine.decision import given_layout
from shoal.errors import ConfigError
from shoal.launch.refuse import check, refuse_illegal

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 100,
}
VIT = {
    "model_type": "vit",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
UNKNOWN = {"model_type": "a-new-one", "hidden_size": 64}


def recipe(*overrides: str) -> Recipe:
    return load_recipe("quickstart", ["train.global_batch_samples=16", *overrides])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.replicate=1", "sync.codec.kind=int8"], "int8 has nothing to compress"),
        (["parallel.replicate=2", "sync={kind: diloco}", "launch.workers=threads"], "diloco needs"),
        (["parallel.pipeline=2", "train.micro_batch_samples=16"], "needs 2 or more micro batches"),
        (["parallel.pipeline=2", "task={kind: embedding}"], "more than one forward.*shard=2"),
        (["parallel.shard=2", "train.exact=true"], "train.exact.*parallel.replicate alone"),
        (["parallel.tensor=2", "model.dropout=framework"], "set model.dropout to keyed or off"),
        (["parallel.shard=2", "launch.workers=threads"], "threads carry the replicate axis only"),
        (["parallel.shard=3"], "3 shards do not divide global_batch_samples 16.*2, 4"),
        (
            ["parallel={replicate: 2, shard: 4}", "train.micro_batch_samples=8"],
            "does not divide a shard's share of 2 samples.*such as 2",
        ),
        (["parallel={shard: {degree: 2, level: all}}"], "level.*parameters"),
        (["parallel={shard: 0}"], "parallel.shard"),
        (["parallel.recompute=some"], "recompute.*selective"),
    ],
)
def test_whatever_the_model(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        check(recipe(*overrides))


@pytest.mark.parametrize(
    ("config", "overrides", "words"),
    [
        (LLAMA, ["parallel.tensor=3"], "3 does not divide 8 query heads.*1, 2, 4.*nearest is 2"),
        (LLAMA, ["parallel.tensor=8"], "degrees that do: 1, 2, 4"),
        (VIT, ["parallel.tensor=2"], "vit model cannot be cut along tensor.*shard=2 instead"),
        (
            {"model_type": "squeezebert"},
            ["parallel.shard=2"],
            "squeezebert model cannot be cut along shard.*replicate=2 instead",
        ),
        (UNKNOWN, ["parallel.tensor=2"], "no table for the family a-new-one.*takes any family"),
    ],
)
def test_what_this_model_cannot(config: dict[str, Any], overrides: list[str], words: str) -> None:
    asked = recipe(*overrides)
    with pytest.raises(ConfigError, match=f"(?s){words}"):
        refuse_illegal(asked, given_layout(asked), config=config)


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        (LLAMA, ["parallel.tensor=4", "parallel.shard=2"]),
        (VIT, ["parallel.shard=4"]),
        (UNKNOWN, ["parallel.shard=2"]),
        (UNKNOWN, ["parallel.replicate=2"]),
    ],
)
def test_what_can_run_is_not_refused(config: dict[str, Any], overrides: list[str]) -> None:
    asked = recipe(*overrides)
    layout = check(asked)
    refuse_illegal(asked, layout, config=config)
    assert layout == given_layout(asked)


def test_an_axis_takes_settings_beside_its_degree() -> None:
    asked = recipe("parallel.shard=4", "parallel.shard.level=gradients")
    assert asked.parallel.sharding.model_dump() == {
        "degree": 4,
        "level": "gradients",
        "offload": False,
    }
    assert given_layout(asked).shard == 4
