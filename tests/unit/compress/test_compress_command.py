"""shoal compress from a run to a folder that transformers and shoal open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shoal.compress.inputs import rounded_inputs
from shoal.errors import DataError, ModelError, UserError
from shoal.launch.compressing import REPORT, compress
from shoal.launch.compression import Wanted
from shoal.observe.console import Console
from shoal.serve.reading import read_model
from tiny import Bench, Run, write_corpus


@pytest.fixture(scope="module")
def trained(bench: Bench) -> Run:
    return bench.run("train.steps=12")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("calibration") / "text.txt", seed=5)


def made(trained: Run, text: Path, out: Path, **asked: Any) -> dict[str, Any]:
    wanted = Wanted(
        model=str(trained.path), out=out, calibrate=str(text), samples=16, tokens=32, **asked
    )
    with Console() as console:
        return compress(wanted, console=console)


@pytest.mark.parametrize(("kind", "group", "most"), [("int8", None, 0.01), ("int4", 16, 0.3)])
def test_a_rounded_model(
    trained: Run, text: Path, tmp_path: Path, kind: str, group: int | None, most: float
) -> None:
    out = tmp_path / "small"
    found = made(trained, text, out, quantise=kind, group=group, method="gptq")
    assert abs(found["loss_change"]) < most and found["reload_difference"] == 0.0
    assert found["bytes_after"] < 0.75 * found["bytes_before"]
    assert json.loads((out / REPORT).read_text()) == found
    assert found["calibration"] == {"source": str(text), "samples": 16}
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ours = read_model(out, auto_class="AutoModelForCausalLM")
    theirs(input_ids=torch.tensor([[3, 4, 5]]))  # they unpack at the first forward
    unpacked = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, unpacked[name]), name
    again = made(trained, text, tmp_path / "again", quantise=kind, group=group, method="gptq")
    files = [(each / "model.safetensors").read_bytes() for each in (out, tmp_path / "again")]
    assert files[0] == files[1] and again["calibration_hash"] == found["calibration_hash"]


@pytest.mark.slow
def test_pruned_and_recovered(trained: Run, text: Path, tmp_path: Path) -> None:
    """Training brings back what pruning took, and no weight that went."""
    prune = ("layers:1", "wanda:0.5")
    lost = made(trained, text, tmp_path / "lost", prune=prune)
    keys = ("train.optimizer.learning_rate=3e-3", "launch.threads_per_worker=1")
    back = made(trained, text, tmp_path / "back", prune=prune, recover=30, overrides=keys)
    assert lost["loss_change"] > 0 and back["loss_change"] < 0.5 * lost["loss_change"]
    assert "zeros among the weights give no speed here" in lost["notes"][0]
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("lost", "back")
    ]
    for one, other in zip(*(model.model.layers.parameters() for model in models), strict=True):
        assert one.dim() == 1 or torch.equal(one == 0, other == 0)


def test_a_loss_above_the_limit_writes_nothing(trained: Run, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    asked = {"quantise": "int4", "prune": ("wanda:0.9",), "limit_loss": 0.001}
    with pytest.raises(UserError, match=r"above --limit-loss 0.001: nothing was written"):
        made(trained, text, out, **asked)
    assert not out.exists()
    made(trained, text, out, **asked, force=True)
    assert (out / "config.json").is_file()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "nothing to do: give --quantise, --prune, or both"),
        ({"quantise": "int3"}, "--quantise: expected one of int8, .*got 'int3'"),
        ({"quantise": "int8", "method": "best"}, "--method: expected one of nearest, .*got 'best'"),
        ({"quantise": "int4", "method": "qat"}, "trains on the grid: give --recover STEPS too"),
        ({"prune": ("layers:1",), "group": 8}, "say how weights are rounded: give --quantise"),
        ({"quantise": "gguf-q8_0", "group": 8}, "gguf-q8_0 has groups of 32; leave --group out"),
        ({"quantise": "int8-dynamic", "group": 8}, "has a scale for each row; leave --group out"),
        ({"quantise": "gguf-q4_1", "method": "awq"}, "gguf-q4_1 is rounded to the nearest"),
        ({"quantise": "int8", "workers": 0}, "--workers: expected at least 1, got 0"),
        ({"prune": ("width:2:4",)}, "width:2:4: expected a share between 0 and 1"),
        ({"quantise": "int8", "group": 0}, "--group: expected at least 1, got 0"),
        ({"quantise": "int8", "recover": 5}, "--recover trains what was pruned"),
        ({"prune": ("layers:1",), "overrides": ("seed=1",)}, "for the training of --recover"),
        ({"prune": ("depth:0.5",)}, "--prune: expected layers:N, width:SHARE"),
        ({"prune": ("wanda:2",)}, "expected a share between 0 and 1"),
        ({"quantise": "int8", "group": 7}, "--group 7 does not divide the 32 inputs"),
        ({"prune": ("layers:2",)}, "the model has 2; leave at least one"),
    ],
)
def test_what_cannot_be(
    trained: Run, text: Path, tmp_path: Path, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        made(trained, text, tmp_path / "small", **asked)
    assert not (tmp_path / "small").exists()


def test_too_little_text(trained: Run, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A lamp.\n\n\nA boat.\n\n\nA fox.\n")
    with pytest.raises(DataError):
        made(trained, short, tmp_path / "small", quantise="int8")
    full = tmp_path / "full"
    full.mkdir()
    (full / "there").touch()
    with pytest.raises(UserError, match="exists and is not empty"):
        Wanted(model="m", out=full, calibrate="d", quantise="int8")


@pytest.mark.parametrize(
    "form", ["gguf-q4_0", *(pytest.param(f, marks=pytest.mark.slow) for f in ("f16", "q8_0"))]
)
def test_a_gguf_file(trained: Run, text: Path, tmp_path: Path, form: str) -> None:
    """It says what it holds, and holds what was measured."""
    form = form if form.startswith("gguf-") else f"gguf-{form}"
    method = "gptq" if form == "gguf-q4_0" else "nearest"
    found = made(trained, text, tmp_path / "small", quantise=form, method=method)
    assert sorted(file.name for file in (tmp_path / "small").iterdir()) == [REPORT, "model.gguf"]
    assert found["reload_difference"] == 0.0 and abs(found["loss_change"]) < 0.05
    assert found["tokens_per_second_before"] > 0 and found["tokens_per_second_after"] is None
    assert found["bytes_after"] < found["bytes_before"]
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", gguf_file="model.gguf", dtype=torch.float32
    )
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.isfinite(theirs(input_ids=ids).logits).all()
    if form == "gguf-f16":
        ours = read_model(trained.path / "model", auto_class="AutoModelForCausalLM")
        answers = [
            each.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)
            for each in (ours, theirs)
        ]
        assert torch.equal(*answers)


def test_inputs_of_8_bits(trained: Run, text: Path, tmp_path: Path) -> None:
    """What was measured is what compressed-tensors computes when transformers opens the folder."""
    out = tmp_path / "small"
    found = made(trained, text, out, quantise="int8-dynamic")
    assert found["reload_difference"] == 0.0 and abs(found["loss_change"]) < 0.05
    ours = read_model(out, auto_class="AutoModelForCausalLM")
    theirs = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.arange(3, 51).view(2, 24)
    layers = [
        path for path, each in ours.model.layers.named_modules() if type(each) is torch.nn.Linear
    ]
    with torch.no_grad():
        plain = ours(input_ids=ids).logits
        with rounded_inputs(ours.model.layers, layers):
            rounded = ours(input_ids=ids).logits
        wanted = theirs(input_ids=ids).logits
    apart = (rounded - wanted).abs().max()
    assert float(apart) < 1e-5 * float(wanted.abs().max())
    assert float((plain - wanted).abs().max()) > 10 * float(apart)


@pytest.mark.parametrize("lacking", ["weight", "weight_scale"])
def test_a_folder_that_lacks_a_part(trained: Run, text: Path, tmp_path: Path, lacking: str) -> None:
    out = tmp_path / "small"
    made(trained, text, out, quantise="int8-dynamic")
    stored = load_file(out / "model.safetensors")
    del stored[f"model.layers.0.mlp.up_proj.{lacking}"]
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj\.weight"):
        read_model(out, auto_class="AutoModelForCausalLM")


@pytest.mark.slow
def test_layers_that_are_turned_round(bench: Bench, text: Path, tmp_path: Path) -> None:
    """GPT-2: no folder tells of rounded inputs, and a GGUF file holds what was rounded."""
    sizes = "n_embd: 32, n_layer: 2, n_head: 4, n_positions: 64"
    model = f"model={{kind: config, architecture: gpt2, {sizes}}}"
    run = bench.run(model, "train.steps=4")
    with pytest.raises(UserError, match=r"(?s)gpt2 are stored turned round.*nearest: --quantise"):
        made(run, text, tmp_path / "small", quantise="int8-dynamic")
    found = made(run, text, tmp_path / "file", quantise="gguf-q8_0", prune=("channels:0.5",))
    assert found["reload_difference"] == 0.0


def test_the_number_of_workers_changes_no_bit(trained: Run, text: Path, tmp_path: Path) -> None:
    """12 samples: batches of 4, so three workers have one each."""
    files = []
    for workers in (1, 3):
        out = tmp_path / str(workers)
        wanted = Wanted(
            model=str(trained.path),
            out=out,
            calibrate=str(text),
            samples=12,
            tokens=32,
            quantise="int4",
            method="gptq",
            group=16,
            prune=("channels:0.5", "sparsegpt:0.3"),
            workers=workers,
        )
        with Console() as console:
            compress(wanted, console=console)
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.slow
def test_heads_and_channels_left_out_and_trained(trained: Run, text: Path, tmp_path: Path) -> None:
    """A narrower folder that transformers opens; training brings back most of what went."""
    lost = made(trained, text, tmp_path / "lost", prune=("width:0.5",))
    keys = ("train.optimizer.learning_rate=3e-3", "launch.threads_per_worker=1")
    back = made(trained, text, tmp_path / "back", prune=("width:0.5",), recover=30, overrides=keys)
    assert lost["loss_change"] > 0 and back["loss_change"] < 0.5 * lost["loss_change"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert theirs.config.num_attention_heads == 2 and theirs.config.head_dim == 8
    assert theirs.config.num_key_value_heads == 1 and theirs.config.intermediate_size == 32
