"""Adapters beside rounded matrices, held against a float32 run over matrices numpy rounded."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from shoal.errors import ModelError, UserError
from shoal.models.rounded_base import floats_of, in_buffer, nearest
from shoal.prove.rehearse import Fault, rehearse
from tiny import Bench, largest_difference

GPT2 = (
    "model={kind: config, architecture: gpt2, n_embd: 32, n_layer: 2, n_head: 4, "
    "n_positions: 64, embd_pdrop: 0.0, resid_pdrop: 0.0, attn_pdrop: 0.0}"
)
SHORT = ("train.steps=8", "train.evaluate_every_steps=4", "checkpoint.every_steps=4")
RATE = "train.optimizer.learning_rate=0.01"


@pytest.fixture(scope="module", params=["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def base(request: pytest.FixtureRequest, bench: Bench) -> Path:
    """A trained folder."""
    return bench.run("train.steps=4", *([GPT2] if request.param == "gpt2" else [])).path / "model"


def adapted(base: Path, adapter: str) -> tuple[str, ...]:
    return (*SHORT, RATE, f"model={{path: {base}, adapter: {{{adapter}}}}}")


# appendix E of QLoRA (arXiv 2305.14314), to seven digits
BELOW = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
ABOVE = [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
LEVELS = np.array([*BELOW, *ABOVE])


def by_numpy(weight: Tensor, form: str) -> Tensor:
    """Each row rounded and back, in float64."""
    rows = weight.double().numpy()
    if form == "int8":
        scales = np.abs(rows).max(1, keepdims=True) / 127
        return torch.from_numpy(np.rint(rows / scales) * scales).float()
    found = np.empty_like(rows)
    for start in range(0, rows.shape[1], 64):
        part = rows[:, start : start + 64]
        scales = np.abs(part).max(1, keepdims=True)
        far = np.abs(part[:, :, None] / scales[:, :, None] - LEVELS)
        found[:, start : start + 64] = LEVELS[far.argmin(2)] * scales
    return torch.from_numpy(found).float()


def rounded_folder(base: Path, out: Path, form: str) -> Path:
    """The same folder with the blocks' matrices rounded."""
    shutil.copytree(base, out)
    tensors = load_file(base / "model.safetensors")
    for name, value in tensors.items():
        if value.dim() == 2 and (".layers." in name or ".h." in name):
            turned = "c_attn" in name or "c_proj" in name or "c_fc" in name
            tensors[name] = (
                by_numpy(value.t(), form).t() if turned else by_numpy(value, form)
            ).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    found: Tensor = model(input_ids=torch.arange(64).view(2, 32) * 7 % 300).logits
    return found


@pytest.mark.quick(1)
@pytest.mark.parametrize("form", ["int8", "nf4"])
@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_it_trains_what_a_rounded_model_trains(
    bench: Bench, base: Path, tmp_path: Path, kind: str, form: str
) -> None:
    """The same losses, evaluations and written model as in float32 over matrices numpy rounded."""
    adapter = f"kind: {kind}, rank: 4, dropout: 0.1"
    run = bench.run(*adapted(base, f"{adapter}, base: {form}"))
    plain = bench.run(*adapted(rounded_folder(base, tmp_path / "rounded", form), adapter))
    assert largest_difference(run.losses, plain.losses) < 1e-6
    assert run.losses != bench.run(*adapted(base, adapter)).losses
    for ours, theirs in zip(run.evaluations, plain.evaluations, strict=True):
        assert ours["evaluation_loss"] == pytest.approx(theirs["evaluation_loss"], rel=1e-6)
    assert torch.allclose(
        logits(run.path / "model"), logits(plain.path / "model"), rtol=1e-5, atol=2e-6
    )


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("parallel.replicate=2",), marks=pytest.mark.slow),
        ("parallel.replicate=2", "launch.workers=threads"),
        pytest.param(("precision.compute=bfloat16",), marks=pytest.mark.slow),
        pytest.param(
            ("parallel.compile=true",), marks=[pytest.mark.slow, pytest.mark.timeout(600)]
        ),
    ],
)
def test_in_any_form_the_same_curve(bench: Bench, words: tuple[str, ...]) -> None:
    folder = bench.run("train.steps=4").path / "model"
    kept = adapted(folder, "rank: 4, base: nf4")
    near = 2e-2 if "precision.compute=bfloat16" in words else 1e-5
    assert largest_difference(bench.run(*kept, *words).losses, bench.run(*kept).losses) < near


@pytest.mark.parametrize("form", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_what_is_saved_goes_on(bench: Bench, base: Path, form: str) -> None:
    words = adapted(base, f"rank: 4, base: {form}")
    straight, halted = bench.run(*words), bench.train(*words, "train.stop_after_steps=4")
    names = {
        piece
        for folder in halted.path.glob("checkpoints/step-*/*.safetensors")
        for piece in load_file(folder)
    }
    assert names and not any("rounded" in name or "proj.weight" in name for name in names)
    done = bench.resume(halted)
    assert done.losses == straight.losses and done.weights == straight.weights


@pytest.mark.slow
def test_a_flipped_bit_of_it_is_repaired(bench: Bench) -> None:
    """Of four replicas the one whose matrices changed gets those of the others."""
    folder = bench.run("train.steps=4").path / "model"
    words = (*adapted(folder, "rank: 4, base: int8"), "parallel.replicate=4")
    out = bench.new_path()
    out.mkdir()
    found = rehearse(
        bench.recipe,
        (*words, "train.micro_batch_samples=2"),
        faults=[Fault.parse("flip-optimizer:2@5")],  # of the last of its state, which this is
        out=out,
        pool=bench.pool,
        clean=bench.run(*words, "train.micro_batch_samples=2").path,
    )
    (seen,) = found.faults
    assert seen.fired and seen.noticed_as == "repaired", str(found)
    assert found.same_digits and found.same_weights, str(found)


@pytest.mark.parametrize(("form", "kept_bytes"), [("int8", 96 * (64 + 4)), ("nf4", 96 * (32 + 4))])
def test_a_layer_keeps_bytes_between_its_passes(form: str, kept_bytes: int) -> None:
    """The product is torch's of the restored matrix, to the bit; nothing float of W is kept."""
    torch.manual_seed(0)
    weight = torch.randn(96, 64)
    ours = nearest(weight, form)
    assert torch.allclose(ours.restored(), by_numpy(weight, form), rtol=1e-6, atol=1e-7)
    mine, plain = (torch.randn(5, 64, generator=torch.Generator().manual_seed(1)) for _ in "ab")
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = ours.product(mine.requires_grad_())
    theirs = torch.nn.functional.linear(plain.requires_grad_(), ours.restored())
    assert torch.equal(found, theirs)
    for each in (found, theirs):
        each.square().sum().backward()
    assert torch.equal(mine.grad, plain.grad)  # type: ignore[arg-type]
    assert sum(each.nbytes for each in kept) == kept_bytes
    assert 4 * floats_of({"w": (96, 64)}, form) == kept_bytes


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_rows_of_any_length_and_of_zeros(form: str) -> None:
    """In one buffer beside others, each row by itself, the last block of a row short."""
    torch.manual_seed(0)
    shapes = {"a": (3, 100), "b": (5, 7), "c": (2, 64)}
    flat = torch.full((floats_of(shapes, form),), math.nan)
    kept = in_buffer(shapes, flat, form)
    given = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    given["a"][1] = 0.0
    for name, weight in kept.items():
        weight.copy_(given[name])
    for name, weight in kept.items():
        found = weight.restored()
        alone = [nearest(row[None], form).restored()[0] for row in given[name]]
        assert torch.equal(found, torch.stack(alone))
        some = given[name].abs().amax(1) > 0
        near = by_numpy(given[name][some], form)
        assert torch.allclose(found[some], near, rtol=1e-6, atol=1e-8)
    assert torch.equal(kept["a"].restored()[1], torch.zeros(100))


def test_the_bytes_are_those_of_bitsandbytes() -> None:
    """Codes, scales and what they come to."""
    theirs = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    for shape in ((96, 64), (64, 576), (33, 192)):
        weight = torch.randn(shape) * 0.05
        codes, about = theirs.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        ours = nearest(weight, "nf4")
        assert torch.equal(ours.codes.view(-1), codes.view(-1))
        assert torch.equal(ours.scales.view(-1), about.absmax.view(-1))
        assert torch.equal(ours.restored(), theirs.dequantize_4bit(codes, about))


def test_where_it_cannot_be(bench: Bench) -> None:
    folder, out = bench.run("train.steps=4").path / "model", bench.new_path()
    int8 = adapted(folder, "rank: 4, base: int8")
    with pytest.raises(UserError, match=r"int8 keeps whole matrices(.|\n)*parallel.shard=1"):
        bench.train(*int8, "parallel={shard: 2}", out=out)
    with pytest.raises(UserError, match="these weights are drawn"):
        bench.train(*SHORT, "model.adapter={rank: 4, base: int8}", out=out)
    assert not out.exists()
    tensors = load_file(folder / "model.safetensors")
    broken = bench.new_path()
    shutil.copytree(folder, broken)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"the folder of model\.path lacks it"):
        bench.train(*adapted(broken, "rank: 4, base: int8"), out=bench.new_path())
