"""The engine beside the model's own forward, and each answer alone beside the same in company."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from shoal.errors import UserError
from shoal.models.anatomy import hidden_of
from shoal.models.huggingface import build_meta, read_config
from shoal.models.init import materialise, record
from shoal.serve.cache import Rows
from shoal.serve.certificate import answers, certify
from shoal.serve.engine import Engine
from shoal.serve.exact import make_exact
from shoal.serve.fuse import fuse_attention, fuse_gates, fuse_layers, fuse_norms
from shoal.serve.int8 import Int8Product, cannot_multiply
from shoal.serve.request import Request, Sampling
from shoal.serve.runner import Runner
from unit.models.tiny_models import MIXTURES, SETTINGS, VOCABULARY, real_model

DECODERS = tuple(
    each for each in (*SETTINGS, *MIXTURES) if each not in ("bert", "roberta", "vit", "t5")
)


def runner_of(family: str, *, num_blocks: int = 40) -> Runner:
    return Runner(real_model(family), num_blocks=num_blocks, block_tokens=32)


@pytest.mark.quick(4)
@pytest.mark.parametrize("family", ("gemma2", "gpt2", "deepseek_v3", "mistral", *DECODERS))
def test_log_probabilities_are_those_of_the_models_own_forward(family: str) -> None:
    """Oracle: one forward of transformers' modules over the whole text, by torch's attention."""
    own = real_model(family)
    engine = Engine(runner_of(family), step_tokens=24)
    prompts = [tuple((7 * i + n) % VOCABULARY for i in range(n)) for n in (1, 9, 40)]
    settings = Sampling(max_tokens=8, temperature=0.0, logprobs=0)
    asked = [Request(id=str(len(p)), prompt=p, sampling=settings) for p in prompts]
    made = answers(engine, asked)
    for request in asked:
        tokens = [each.token for each in made[request.id]]
        whole = torch.tensor([[*request.prompt, *tokens]])
        with torch.no_grad():
            output = own(input_ids=whole, use_cache=False).logits[0].float()
        wanted = torch.log_softmax(output, dim=-1)[len(request.prompt) - 1 : -1]
        found = torch.tensor([each.logprob for each in made[request.id]])
        chosen = wanted[range(len(tokens)), tokens]
        # other orders of summation, in float32: some units in the last place of values near 4
        assert torch.allclose(found, chosen, atol=1e-5, rtol=0)
        assert torch.all(wanted.amax(dim=-1) - chosen < 1e-5), "not the likeliest"


@pytest.mark.quick(1)
@pytest.mark.parametrize("family", DECODERS)
def test_the_same_bits_alone_and_in_any_company(family: str) -> None:
    runner = runner_of(family)
    assert runner.exact, str(runner.report)
    found = certify(runner, name=family, num_requests=8, most_prompt=60, most_made=40)
    assert found.proven, str(found)
    by_name = {each.condition: each for each in found.found}
    assert by_name["preempted"].preemptions > 0
    assert by_name["prefixes found"].cached_tokens > 0


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_the_same_bits_in_bfloat16(family: str) -> None:
    runner = Runner(real_model(family).bfloat16(), num_blocks=40, block_tokens=32)
    found = certify(runner, name=family, num_requests=8, most_prompt=60, most_made=20)
    assert found.proven == runner.exact, str(found)
    different = [each for each in found.found if each.different]
    assert not different, str(found)


def test_products_of_8_bits_are_right_or_refused() -> None:
    """The largest codes of both signs: a processor without VNNI overflows, and is not used."""
    rows, weight = torch.ones(3, 64), torch.ones(4, 64)
    rows[1], weight[1:3] = -1.0, -1.0
    if cannot_multiply() is None:
        made = Int8Product(weight, None)(rows)
        assert torch.allclose(made, rows @ weight.T, rtol=1e-6, atol=0)
    else:
        with pytest.raises(UserError, match=r"int8 cannot be served here(.|\n)*leave it at full"):
            Runner(real_model("llama"), num_blocks=40, block_tokens=32, int8=True)


@pytest.mark.parametrize("family", ("llama", pytest.param("gpt2", marks=pytest.mark.slow)))
def test_products_of_8_bits_keep_their_bits_and_are_near_the_whole_ones(family: str) -> None:
    """Oracle: the products in float64 of weights and rows that were rounded to 8 bits by hand."""
    if (why := cannot_multiply()) is not None:
        pytest.skip(why)
    whole = real_model(family)
    runner = Runner(real_model(family), num_blocks=40, block_tokens=32, int8=True)
    assert runner.exact and "int8 weights" in str(runner.report)
    found = certify(runner, name=family, num_requests=8, most_prompt=60, most_made=20)
    assert found.proven, str(found)
    layer = "model.layers.0.mlp.down_proj" if family == "llama" else "transformer.h.0.mlp.c_proj"
    module = whole.get_submodule(layer)
    weight = module.weight.detach() if family == "llama" else module.weight.detach().t()
    rows = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(3))
    rounded = [
        (each / (each.abs().amax(1, keepdim=True) / 127)).round().double()
        * (each.abs().amax(1, keepdim=True) / 127).double()
        for each in (rows, weight)
    ]
    wanted = rounded[0] @ rounded[1].T
    bias = 0 if module.bias is None else module.bias.detach().double()
    made = runner.model.get_submodule(layer)(rows).double()
    # one rounding to float32 of each sum, two of its scales
    assert torch.allclose(made, wanted + bias, rtol=1e-6, atol=1e-7)


def wide_model(family: str) -> Any:
    """One whose layers are wide enough to be joined."""
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        **({"head_dim": 16} if family == "gemma2" else {}),
    }
    config = read_config(architecture=family, settings=settings, vocabulary_size=VOCABULARY)
    model = build_meta(config, auto_class="AutoModelForCausalLM")
    return materialise(model, record=record(model), seed=3).eval()


@pytest.mark.parametrize("family, fuses", [("llama", True), ("mistral", True), ("gemma2", False)])
def test_what_is_fused_gives_the_bits_of_the_models_own_modules(family: str, fuses: bool) -> None:
    plain, fused = wide_model(family), wide_model(family)
    make_exact(plain)
    kernel = partial(Rows, least=2)
    joined = make_exact(fused).joined
    assert len(joined) == 4, "queries, keys and values, and gates and ups, of two layers"
    # gemma's norms add one to their weights, its heads are capped: they stay as they are
    assert fuse_norms(fused) == (5 if fuses else 0)
    assert fuse_gates(fused, joined) == (2 if fuses else 0)
    assert fuse_attention(fused, joined, kernel=kernel) == (2 if fuses else 0)
    assert fuse_layers(fused, kernel=kernel) == (2 if fuses else 0)
    tokens = torch.arange(64)[None] % VOCABULARY
    batch = {"input_ids": tokens, "position_ids": torch.arange(64)[None]}
    with torch.no_grad():
        before = hidden_of(plain, batch, kernel=kernel())
        assert torch.equal(hidden_of(fused, batch, kernel=kernel()), before)


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_fused_layers_give_the_same_bits_in_any_company(family: str) -> None:
    runner = Runner(wide_model(family), num_blocks=40, block_tokens=32)
    assert runner.report is not None and len(runner.report.joined) == 4
    found = certify(runner, name=family, num_requests=8, most_prompt=60, most_made=40)
    assert found.proven, str(found)
