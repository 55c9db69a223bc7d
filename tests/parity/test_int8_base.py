"""Adapters beside matrices in 8 bits, held against a float32 run over matrices rounded by numpy."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from shoal.errors import ModelError, UserError
from shoal.models.int8_base import floats_of, nearest
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


def by_numpy(weight: Tensor) -> Tensor:
    """Each row in 8 bits and back, in float64."""
    rows = weight.double().numpy()
    scales = np.abs(rows).max(1, keepdims=True) / 127
    return torch.from_numpy(np.rint(rows / scales) * scales).float()


def rounded_folder(base: Path, out: Path) -> Path:
    """The same folder with the blocks' matrices rounded."""
    shutil.copytree(base, out)
    tensors = load_file(base / "model.safetensors")
    for name, value in tensors.items():
        if value.dim() == 2 and (".layers." in name or ".h." in name):
            turned = "c_attn" in name or "c_proj" in name or "c_fc" in name
            tensors[name] = (by_numpy(value.t()).t() if turned else by_numpy(value)).contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    found: Tensor = model(input_ids=torch.arange(64).view(2, 32) * 7 % 300).logits
    return found


@pytest.mark.quick(2)
@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_it_trains_what_a_rounded_model_trains(
    bench: Bench, base: Path, tmp_path: Path, kind: str
) -> None:
    """The same losses, evaluations and written model as in float32 over matrices numpy rounded."""
    adapter = f"kind: {kind}, rank: 4, dropout: 0.1"
    run = bench.run(*adapted(base, f"{adapter}, base: int8"))
    plain = bench.run(*adapted(rounded_folder(base, tmp_path / "rounded"), adapter))
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
    int8 = adapted(folder, "rank: 4, base: int8")
    near = 2e-2 if "precision.compute=bfloat16" in words else 1e-5
    assert largest_difference(bench.run(*int8, *words).losses, bench.run(*int8).losses) < near


def test_what_is_saved_goes_on(bench: Bench, base: Path) -> None:
    words = adapted(base, "rank: 4, base: int8")
    straight, halted = bench.run(*words), bench.train(*words, "train.stop_after_steps=4")
    names = {
        piece
        for folder in halted.path.glob("checkpoints/step-*/*.safetensors")
        for piece in load_file(folder)
    }
    assert names and not any("int8" in name or "proj.weight" in name for name in names)
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


def test_a_layer_keeps_bytes_between_its_passes() -> None:
    """The product is torch's of the restored matrix, to the bit; nothing float of W is kept."""
    torch.manual_seed(0)
    weight = torch.randn(96, 64)
    ours = nearest(weight)
    assert torch.allclose(ours.restored(), by_numpy(weight), rtol=1e-6, atol=0)
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
    assert sum(each.nbytes for each in kept) == 96 * 64 + 4 * 96
    assert 4 * floats_of({"w": (96, 64)}) == 96 * 64 + 4 * 96


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
