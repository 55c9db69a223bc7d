"""Zeros among weights, and blocks left out: against numpy and transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from shoal.compress.blocks import Pruning, Rounding, compress_blocks
from shoal.compress.masks import Sparsity, wanda
from shoal.compress.second_order import sparse_gpt
from shoal.compress.shorten import influences, without_blocks
from shoal.compress.walk import Walk
from shoal.compress.workers import Workers
from shoal.errors import ConfigError, ModelError, UserError
from shoal.models.anatomy import anatomy_of
from shoal.models.grid import Grid
from tiny import Bench

IDS = [torch.arange(start, start + 48).view(2, 24) for start in (3, 60)]


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers(2) as found:
        yield found


def a_model(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = {"vocab_size": 120, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
        return GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    sizes = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


@pytest.mark.parametrize("text", ["0", "1.0", "much", "4:2", "2:2"])
def test_shares_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="expected a share between 0 and 1"):
        Sparsity.parse(text)


def test_wanda_is_its_formula() -> None:
    draw = np.random.default_rng(0)
    weight, inputs = draw.normal(size=(5, 16)), draw.normal(size=(40, 16)) * np.arange(1, 17)
    squares = torch.from_numpy((inputs**2).sum(0))
    found = wanda(torch.from_numpy(weight), squares, Sparsity(0.5)).numpy()
    worth = np.abs(weight) * np.linalg.norm(inputs, axis=0)
    for row, values in enumerate(worth):
        gone = np.argsort(values)[:8]
        wanted = weight[row].copy()
        wanted[gone] = 0.0
        assert np.array_equal(found[row], wanted)
    pairs = wanda(torch.from_numpy(weight), squares, Sparsity.parse("2:4")).numpy()
    assert ((pairs.reshape(-1, 4) == 0).sum(1) == 2).all()


def test_sparse_gpt_makes_up_for_what_goes() -> None:
    draw = np.random.default_rng(1)
    weight = torch.from_numpy(draw.normal(size=(6, 32)))
    inputs = torch.from_numpy(draw.normal(size=(200, 32)) @ draw.normal(size=(32, 32)))
    hessian, squares = inputs.T @ inputs, inputs.square().sum(0)
    for text in ("0.5", "2:4"):
        sparsity = Sparsity.parse(text)
        adapted = sparse_gpt(weight, hessian, sparsity)
        assert float((adapted == 0).double().mean()) == pytest.approx(0.5)
        plain = wanda(weight, squares, sparsity)
        losses = [float(((each - weight) @ inputs.T).square().sum()) for each in (adapted, plain)]
        assert losses[0] < 0.8 * losses[1]
    with pytest.raises(UserError, match="30 inputs, which 4 does not divide"):
        wanda(weight[:, :30], squares[:30], Sparsity.parse("2:4"))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_layers_see_what_transformers_gives_them(kind: str, workers: Workers) -> None:
    """The walk through blocks is the model's own forward, and the sums are of its inputs."""
    model = a_model(kind)
    anatomy = anatomy_of(model)
    walk = Walk.begin(model, anatomy, IDS, workers)
    with torch.no_grad():
        states = [model(input_ids=ids, output_hidden_states=True).hidden_states for ids in IDS]
    first, *_ = walk.blocks
    path = f"{first}.mlp.up_proj" if kind == "llama" else f"{first}.mlp.c_fc"
    given: list[torch.Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, a: given.append(a[0]))
    with torch.no_grad():
        for ids in IDS:
            model(input_ids=ids)
    hook.remove()
    rows = torch.cat([each.flatten(0, 1) for each in given]).double()
    seen = walk.watch(first, hessian=True)[path]
    assert seen.hessian is not None and seen.count == len(rows)
    torch.testing.assert_close(seen.hessian, rows.T @ rows, rtol=1e-5, atol=1e-5)
    for number, name in enumerate(walk.blocks):
        for ours, theirs in zip(walk.hidden, states, strict=True):
            torch.testing.assert_close(ours, theirs[number], rtol=1e-5, atol=1e-6)
        walk.step(name)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_shorter_model_is_the_model_without_those_blocks(kind: str, workers: Workers) -> None:
    model = a_model(kind)
    anatomy = anatomy_of(model)
    each = influences(model, anatomy, IDS, workers)
    assert len(each) == 3 and all(0 <= value <= 2 for value in each)
    config, tensors = without_blocks(model, anatomy, dropped=[1])
    shorter = type(model)(config).eval()
    shorter.load_state_dict(tensors, strict=False)
    shorter.tie_weights()
    wanted = copy.deepcopy(model)
    blocks = wanted.get_submodule(anatomy.blocks)
    del blocks[1]
    for number, block in enumerate(blocks):  # caches go by it
        if hasattr(block, "self_attn"):
            block.self_attn.layer_idx = number
    with torch.no_grad():
        ours, theirs = (
            made(input_ids=IDS[0], use_cache=False).logits for made in (shorter, wanted)
        )
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(UserError, match="leave at least one"):
        without_blocks(model, anatomy, dropped=[0, 1, 2])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_is_compressed_in_place(kind: str, workers: Workers) -> None:
    model = a_model(kind)
    anatomy = anatomy_of(model)
    head = copy.deepcopy(model.get_output_embeddings().weight)
    half = Pruning(Sparsity(0.5), "sparsegpt")
    assert compress_blocks(model, anatomy, IDS, half, workers=workers, keep=["mlp"]) == {}
    rounding = Rounding(Grid(4, 16), "gptq")
    coded = compress_blocks(model, anatomy, IDS, rounding, workers=workers)
    assert len(coded) == (21 if kind == "llama" else 12)
    for path, each in coded.items():
        layer = model.get_submodule(path)
        own = layer.weight.t() if kind == "gpt2" else layer.weight
        assert torch.equal(own, each.weight())
        zeros = float((each.codes == 0).float().mean())
        assert zeros > 0.45 if "attn" in path else zeros < 0.35
    assert torch.equal(model.get_output_embeddings().weight, head)


def test_an_encoder_and_a_decoder_are_refused(workers: Workers) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, d_kv=8)).eval()
    how = Rounding(Grid(8))
    with pytest.raises(ModelError, match=r"t5: an encoder and a decoder are not compressed yet"):
        compress_blocks(model, anatomy_of(model), IDS, how, workers=workers)


@pytest.mark.slow
def test_what_is_zero_stays_zero_in_training(bench: Bench) -> None:
    """From a folder with zeros, in two layouts: they stay, all else moves, the losses agree."""
    first = bench.run("train.steps=4")
    folder = bench.new_path()
    folder.mkdir()
    for file in (first.path / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    model = LlamaForCausalLM.from_pretrained(folder)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[:, ::2] = 0.0
    model.save_pretrained(folder)
    before = load_file(folder / "model.safetensors")
    same = ("model={kind: pretrained, path: " + f"{folder}" + "}", "train.steps=4")
    losses = []
    for layout in ("{replicate: 2}", "{replicate: 1, tensor: 2}"):
        run = bench.train(
            *same, "data.tokenizer={kind: model}", "train.keep_zeros=true", f"parallel={layout}"
        )
        losses.append(run.losses)
        after = load_file(run.path / "model" / "model.safetensors")
        for name, tensor in after.items():
            if tensor.dim() == 2:
                assert torch.equal(tensor == 0, before[name] == 0), name
            assert not torch.equal(tensor, before[name]), name
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.optimizer={kind: muon}", "got muon, which moves whole matrices"),
        ("sync={kind: server}", "got a server, which updates by itself"),
        ("model.adapter={kind: lora}", "got an adapter, which begins at zero"),
    ],
)
def test_zeros_that_cannot_be_kept(bench: Bench, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.train("train.keep_zeros=true", override)
