"""Training with rounded weights: what is packed afterwards is what training saw, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from shoal.errors import ConfigError, ModelError
from shoal.launch.compressing import REPORT, compress
from shoal.launch.compression import Wanted
from shoal.launch.score import score
from shoal.models.grid import Grid, nearest
from shoal.models.on_grid import GridSettings, put_on_grid
from shoal.observe.console import Console
from tiny import Bench, Run, write_corpus

ON_GRID = "train.quantise={bits: 4, group: 16}"


def test_gradients_go_straight_through() -> None:
    """Of each layer: the gradient that torch gives of its rounded weight, held fixed."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))
    root = torch.nn.ModuleDict({"blocks": model})
    inputs, grid = torch.randn(5, 32), Grid(4, 8)
    plain = [nearest(model[n].weight.detach(), grid).weight().requires_grad_() for n in (0, 2)]
    hidden = torch.nn.functional.linear(inputs, plain[0], model[0].bias).tanh()
    wanted = torch.nn.functional.linear(hidden, plain[1], model[2].bias)
    wanted.square().sum().backward()
    assert put_on_grid(root, GridSettings(grid), blocks=("blocks",)) == ["blocks.0", "blocks.2"]
    found = model(inputs)
    assert torch.equal(found, wanted)
    found.square().sum().backward()
    for weight, number in zip(plain, (0, 2), strict=True):
        assert torch.equal(model[number].weight.grad, weight.grad)
    with pytest.raises(ModelError, match="none of the model's linear layers is left"):
        put_on_grid(root, GridSettings(grid, keep=("blocks",)), blocks=("blocks",))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_on_the_grid_computes_as_the_rounded_one(family: str) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2}
    model: Any
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4)).eval()
    else:
        config = LlamaConfig(**sizes, intermediate_size=64, num_attention_heads=4)
        model = LlamaForCausalLM(config).eval()
    blocks = "transformer.h" if family == "gpt2" else "model.layers"
    ids = torch.arange(24)[None]
    paths = put_on_grid(model, GridSettings(Grid(8)), blocks=(blocks,))
    with torch.no_grad():
        found = model(ids).logits
        for path in paths:
            layer = model.get_submodule(path)
            del layer.forward
            turned = layer.weight.t() if family == "gpt2" else layer.weight
            turned.copy_(nearest(turned.contiguous(), Grid(8)).weight())
        wanted = model(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "layout",
    [
        "{replicate: 2}",
        pytest.param("{shard: 2}", marks=pytest.mark.slow),
        pytest.param("{pipeline: 2}", marks=pytest.mark.slow),
        pytest.param("{replicate: 2, recompute: full}", marks=pytest.mark.slow),
        pytest.param("{compile: true}", marks=[pytest.mark.slow, pytest.mark.timeout(400)]),
    ],
)
def test_any_layout_gives_one_loss_curve(bench: Bench, layout: str) -> None:
    same = ("train.steps=6", "train.micro_batch_samples=4", "train.evaluate_every_steps=0")
    one = bench.run(*same, ON_GRID)
    found = bench.run(*same, ON_GRID, f"parallel={layout}")
    plain = bench.run(*same)
    pairs = list(zip(found.losses, one.losses, strict=True))
    # a weight that lies between two points may fall to either side after the first step
    assert abs(pairs[0][0] / pairs[0][1] - 1) < 1e-5
    assert max(abs(a / b - 1) for a, b in pairs) < 2e-3
    assert abs(plain.losses[0] / one.losses[0] - 1) > 1e-5, "weights were rounded"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("grid") / "text.txt", seed=5)


def made(run: Run, text: Path, out: Path, **asked: Any) -> dict[str, Any]:
    wanted = Wanted(
        model=str(run.path), out=out, calibrate=str(text), samples=16, tokens=32, **asked
    )
    with Console() as console:
        return compress(wanted, console=console)


def test_the_packed_folder_has_the_loss_that_training_saw(
    bench: Bench, text: Path, tmp_path: Path
) -> None:
    """The run's last evaluation, on rounded weights, is that of the folder that is packed."""
    run = bench.run("train.steps=12", "train.evaluate_every_steps=12", ON_GRID)
    out = tmp_path / "small"
    made(run, text, out, quantise="int4", group=16)
    seen = load_file(run.path / "model" / "model.safetensors")
    stored = load_file(out / "model.safetensors")
    for name, scales in stored.items():
        if name.endswith("weight_scale"):
            weight = seen[f"{name.removesuffix('_scale')}"]
            assert torch.equal(scales, nearest(weight, Grid(4, 16)).scales)
    with Console() as console:
        found, plain = (
            score(
                folder,
                recipe=bench.recipe,
                overrides=[ON_GRID],
                console=console,
                pool=bench.pool,
            )["evaluation_loss"]
            for folder in (out, run.path / "model")
        )
    wanted = run.evaluations[-1]["evaluation_loss"]
    assert abs(found / wanted - 1) < 1e-6 < abs(plain / wanted - 1)


@pytest.mark.slow
def test_training_on_the_grid_brings_back_what_rounding_took(
    bench: Bench, text: Path, tmp_path: Path
) -> None:
    run = bench.run("train.steps=12")
    keys = ("train.optimizer.learning_rate=3e-3", "launch.threads_per_worker=1")
    lost = made(run, text, tmp_path / "lost", quantise="int4")
    back = made(
        run, text, tmp_path / "back", quantise="int4", method="qat", recover=30, overrides=keys
    )
    assert back["loss_after"] < lost["loss_after"] and back["method"] == "qat"
    assert json.loads((tmp_path / "back" / REPORT).read_text())["recover_steps"] == 30
    pruned = made(
        run,
        text,
        tmp_path / "pruned",
        quantise="gguf-q8_0",
        method="qat",
        prune=("wanda:0.5",),
        recover=30,
        overrides=keys,
    )
    assert pruned["reload_difference"] == 0.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "parallel.tensor=2",
            r"(?s)parallel.tensor.*a scale is of a whole row of weights.*shard=2",
        ),
        ("model.adapter={kind: lora}", "beside an adapter none are"),
        ("train.quantise.group=7", r"(?s)7 does not divide the 32 inputs of a layer.*4 does"),
        ("train.quantise.bits=3", "train.quantise.bits"),
    ],
)
def test_what_cannot_be_on_a_grid(bench: Bench, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.train(ON_GRID, override)
