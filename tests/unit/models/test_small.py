"""Small models of the same kind: what a family's parts are stays, and what is built also runs."""

from __future__ import annotations

from itertools import islice

import pytest
from torch import nn

from shoal.models.anatomy import anatomy_of, check_logits
from shoal.models.huggingface import build_meta, read_config
from shoal.models.small import small_configs, small_model

CAUSAL = "AutoModelForCausalLM"


def kinds(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


@pytest.mark.parametrize(
    "family",
    ["deepseek_v3", "cohere2_moe", "bamba", "granitemoehybrid", "gpt_neo", "lfm2", "jamba"],
)
def test_every_kind_of_module_is_left_in_a_small_model(family: str) -> None:
    """Dense layers and experts, attention of both kinds, state spaces: of the default sizes."""
    config = read_config(architecture=family, settings={"vocab_size": 64})
    small = small_model(config, auto_class=CAUSAL)
    assert kinds(small) == kinds(build_meta(config, auto_class=CAUSAL))
    assert sum(each.numel() for each in small.parameters()) < 5_000_000


def test_lists_of_layers_show_every_kind() -> None:
    config = read_config(architecture="deepseek_v32", settings={"vocab_size": 64})
    small = next(small_configs(config))
    assert config.mlp_layer_types[:4] == ["dense", "dense", "dense", "sparse"]
    assert small.num_hidden_layers == len(small.layer_types) == 4
    assert small.mlp_layer_types == ["dense", "dense", "dense", "sparse"]


def test_classes_are_kept_and_what_single_layers_have() -> None:
    """Both are dictionaries by number."""
    settings = {"vocab_size": 64, "id2label": {0: "a", 1: "b", 2: "c"}}
    small = next(small_configs(read_config(architecture="gemma4_text", settings=settings)))
    assert (small.num_hidden_layers, small.num_labels) == (6, 3)
    assert small.to_dict()["per_layer_config"] == {"5": {"head_dim": 512}}


def test_what_a_class_computes_of_its_sizes_is_computed_anew() -> None:
    """`head_dim` of DeepSeek is the rotary part's, whatever the whole model's dictionary says."""
    config = read_config(architecture="deepseek_v3", settings={"vocab_size": 64})
    _, small = islice(small_configs(config), 2)
    assert (config.head_dim, small.head_dim) == (64, small.qk_rope_head_dim)
    assert small.qk_head_dim == small.qk_nope_head_dim + small.qk_rope_head_dim


def test_a_small_model_that_is_built_also_runs() -> None:
    """CodeGen splits its heads in four: two can be built, and fail at the first call."""
    sizes = {"n_embd": 128, "n_head": 8, "n_layer": 2, "rotary_dim": 8, "vocab_size": 64}
    config = read_config(architecture="codegen", settings=sizes)
    assert next(small_configs(config)).n_head < 4
    model = small_model(config, auto_class=CAUSAL)
    assert model.training and not check_logits(model, anatomy_of(model)).whole_logits
