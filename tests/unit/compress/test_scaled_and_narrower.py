"""Inputs scaled before rounding, heads and channels left out: the model's own forward is held."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel

from shoal.compress.awq import folds_of
from shoal.compress.blocks import Rounding, compress_blocks
from shoal.compress.walk import Walk
from shoal.compress.width import Narrower, narrowed
from shoal.compress.workers import Workers
from shoal.errors import UserError
from shoal.models.anatomy import anatomy_of
from shoal.models.grid import Grid

AUTO_CLASS = "AutoModelForCausalLM"
IDS = [torch.arange(start, start + 48).view(2, 24) for start in (3, 60)]
SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
GPT2: dict[str, Any] = {"vocab_size": 120, "n_embd": 32, "n_layer": 2, "n_head": 4}


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers(2) as found:
        yield found


def a_model(family: str) -> Any:
    """With norms that are not ones."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(GPT2 if family == "gpt2" else SIZES))
    model: Any = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("family", "folded"),
    [("llama", 7), ("qwen3", 7), ("gemma2", 7), ("gpt2", 2), ("olmo2", 2)],
)
def test_what_is_scaled_computes_what_it_did(family: str, folded: int, workers: Workers) -> None:
    """Layers that can be scaled, in one block: a norm after a layer can not give what it takes."""
    model = a_model(family)
    walk = Walk.begin(model, anatomy_of(model), IDS, workers)
    name = next(iter(walk.blocks))
    with torch.no_grad():
        wanted = [model(input_ids=ids).logits for ids in IDS]
        before = {key: value.clone() for key, value in model.state_dict().items()}
        folds = folds_of(model, walk, name)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        for fold in folds:
            inputs = model.get_submodule(fold.layers[0]).weight.shape[family != "gpt2"]
            fold.apply(model, fold.shared(0.5 + torch.rand(inputs)))
        found = [model(input_ids=ids).logits for ids in IDS]
    assert sum(len(each.layers) for each in folds) == folded
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_awq_is_nearer_than_nearest(workers: Workers) -> None:
    """By the outputs of a model whose inputs differ much in size, which is what it is for."""
    losses = []
    for method in ("nearest", "awq"):
        model = a_model("llama")
        with torch.no_grad():
            for each in model.modules():
                if "Norm" in type(each).__name__:
                    each.weight.mul_(torch.linspace(-2, 2, 32).exp())
            wanted = [model(input_ids=ids).logits for ids in IDS]
            how = Rounding(Grid(4, 16), method)
            coded = compress_blocks(model, anatomy_of(model), IDS, how, workers=workers)
            for path, each in coded.items():
                assert torch.equal(model.get_submodule(path).weight, each.weight())
            found = [model(input_ids=ids).logits for ids in IDS]
        pairs = zip(found, wanted, strict=True)
        losses.append(sum(float((a - b).square().sum()) for a, b in pairs))
    assert losses[1] < 0.9 * losses[0]


def silenced(model: Any, narrow: Any) -> Any:
    """The whole model with all that went made silent: what goes into o_proj, into down_proj."""
    heads = narrow.config.num_attention_heads * narrow.config.head_dim
    for whole, part in zip(model.model.layers, narrow.model.layers, strict=True):
        for name, module in (("o_proj", "self_attn"), ("down_proj", "mlp")):
            layer = getattr(getattr(whole, module), name)
            small = getattr(getattr(part, module), name).weight
            # a column of the small one is one of the whole one
            matches = (layer.weight.t()[:, None] == small.t()[None]).all(-1).any(1)
            assert int(matches.sum()) == small.shape[1]
            layer.weight.data[:, ~matches] = 0.0
        assert part.self_attn.o_proj.weight.shape[1] == heads
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_narrower_model_is_the_model_with_silent_parts(family: str, workers: Workers) -> None:
    model = a_model(family)
    config, tensors = narrowed(
        model,
        anatomy_of(model),
        IDS,
        Narrower(heads=0.5, channels=0.5),
        auto_class=AUTO_CLASS,
        workers=workers,
    )
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert config.intermediate_size == 32
    small: Any = type(model)(config).eval()
    small.load_state_dict(tensors, strict=False)
    small.tie_weights()
    small.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = silenced(model, small)(input_ids=IDS[0]).logits
        found = small(input_ids=IDS[0]).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_what_matters_least_goes(workers: Workers) -> None:
    """A group whose values are small and channels that are never large are those that go."""
    model = a_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.data[8:24] *= 0.01
            layer.mlp.up_proj.weight.data[:32] *= 0.01
    _, tensors = narrowed(
        model,
        anatomy_of(model),
        IDS,
        Narrower(heads=0.5, channels=0.5),
        auto_class=AUTO_CLASS,
        workers=workers,
    )
    values = model.model.layers[0].self_attn.v_proj.weight
    kept = tensors["model.layers.0.self_attn.v_proj.weight"]
    assert torch.equal(kept, torch.cat([values[:8], values[24:]]))
    up = model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(tensors["model.layers.1.mlp.up_proj.weight"], up[32:])


def test_gpt2_loses_channels_and_no_heads(workers: Workers) -> None:
    model: GPT2LMHeadModel = a_model("gpt2")
    asked = {"auto_class": AUTO_CLASS, "workers": workers}
    anatomy = anatomy_of(model)
    config, tensors = narrowed(model, anatomy, IDS, Narrower(channels=0.25), **asked)
    assert config.n_inner == 96 and tensors["transformer.h.0.mlp.c_fc.bias"].shape == (96,)
    GPT2LMHeadModel(config).load_state_dict(tensors, strict=False)
    with pytest.raises(UserError, match="gpt2 cannot be made narrower here: its heads"):
        narrowed(model, anatomy, IDS, Narrower(heads=0.5), **asked)
    with pytest.raises(UserError, match=r"0\.01 of 128 channels is less than the 32"):
        narrowed(model, anatomy, IDS, Narrower(channels=0.01), **asked)


def test_one_group_of_heads_cannot_become_fewer(workers: Workers) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**SIZES, "num_key_value_heads": 1})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with pytest.raises(UserError, match="1 groups of heads cannot become fewer in llama"):
        narrowed(
            model,
            anatomy_of(model),
            IDS,
            Narrower(heads=0.5),
            auto_class=AUTO_CLASS,
            workers=workers,
        )


def test_layers_of_other_names_are_refused(workers: Workers) -> None:
    asked = {"auto_class": AUTO_CLASS, "workers": workers}
    joined = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("phi3", **{**SIZES, "num_key_value_heads": 8, "pad_token_id": 0}),
        attn_implementation="eager",
    ).eval()
    for how in (Narrower(heads=0.5), Narrower(channels=0.5)):
        with pytest.raises(UserError, match="phi3 cannot be made narrower here"):
            narrowed(joined, anatomy_of(joined), IDS, how, **asked)
