"""Adapters as runs, held against peft: its files, its forward, its gradients."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from shoal.cli.main import main
from shoal.config.load import load_recipe
from shoal.data.stream import Stream
from shoal.errors import ModelError, RunError, UserError
from shoal.launch.prepare import prepare_inputs
from shoal.layout import Share
from tiny import Bench, largest_difference

GPT2 = (
    "model={kind: config, architecture: gpt2, n_embd: 32, n_layer: 2, n_head: 4, "
    "n_positions: 64, embd_pdrop: 0.0, resid_pdrop: 0.0, attn_pdrop: 0.0}"
)
SHORT = ("train.steps=8", "train.evaluate_every_steps=4", "checkpoint.every_steps=4")
RATE = "train.optimizer.learning_rate=0.01"


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, bench: Bench) -> Path:
    """A trained folder."""
    return bench.run("train.steps=4", *([GPT2] if request.param == "gpt2" else [])).path / "model"


def adapted(base: Path, adapter: str) -> tuple[str, ...]:
    return (*SHORT, RATE, f"model={{path: {base}, adapter: {adapter}}}")


def opened(base: Path, adapter: Path | None = None) -> nn.Module:
    """As a user of transformers and peft opens it."""
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    return model if adapter is None else peft.PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    rows = torch.arange(64).view(2, 32) * 7 % 300
    found: Tensor = model(input_ids=rows).logits
    return found


LAYOUTS = [
    "tensor: 2",
    pytest.param("shard: 2", marks=pytest.mark.slow),
    pytest.param("context: 2", marks=pytest.mark.slow),
]


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_peft_opens_what_was_trained(bench: Bench, base: Path, kind: str, layout: str) -> None:
    """RUN/adapter over the folder, and RUN/model, have the same logits; and they have moved."""
    words = adapted(base, f"{{kind: {kind}, rank: 4, dropout: 0.2}}")
    one, run = bench.run(*words), bench.run(*words, f"parallel={{{layout}}}")
    assert largest_difference(run.losses, one.losses) < 1e-5
    theirs = logits(opened(base, run.path / "adapter"))
    assert torch.allclose(logits(opened(run.path / "model")), theirs, rtol=1e-5, atol=2e-6)
    assert (theirs - logits(opened(base))).abs().max() > 1e-2
    before, *_, after = run.evaluations
    assert after["evaluation_loss"] < before["evaluation_loss"]


@pytest.mark.parametrize("change", ["parallel={replicate: 2}", "parallel={shard: 2}"])
def test_nothing_else_changes_a_digit(bench: Bench, change: str) -> None:
    base = bench.run("train.steps=4").path / "model"
    words = adapted(base, "{kind: lora, rank: 4, dropout: 0.2}")
    assert largest_difference(bench.run(*words, change).losses, bench.run(*words).losses) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_blocks_have_them_too(bench: Bench) -> None:
    words = adapted(bench.run("train.steps=4").path / "model", "{kind: lora, rank: 4}")
    compiled = bench.run(*words, "parallel.compile=true")
    assert largest_difference(compiled.losses, bench.run(*words).losses) < 1e-5
    again = bench.run(*words, "parallel.recompute=full")
    assert largest_difference(again.losses, bench.run(*words).losses) < 1e-5


def drawn_by_peft(base: Path, out: Path, **more: object) -> Path:
    """An adapter of peft with nothing at zero."""
    modules = ["c_attn", "c_proj"] if "gpt2" in (base / "config.json").read_text() else ["q_proj"]
    modules += [] if modules[0] == "c_attn" else ["down_proj"]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=modules, fan_in_fan_out=modules[0] == "c_attn", **more
    )
    torch.manual_seed(5)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
        if "magnitude" in name:
            parameter.data.mul_(1.1)
    model.save_pretrained(out)
    return out


@pytest.mark.quick(2)
@pytest.mark.parametrize("dora", [False, True])
def test_steps_are_those_of_peft_and_torch(
    bench: Bench, base: Path, tmp_path: Path, dora: bool
) -> None:
    """Begun from peft's adapter: peft's model and torch's AdamW on the same rows, step by step."""
    folder = drawn_by_peft(base, tmp_path / "drawn", use_dora=dora)
    words = (
        *adapted(base, f"{{path: {folder}}}"),
        "data.packing=false",
        "train.optimizer={kind: adamw, learning_rate: 0.01, weight_decay: 0.0}",
        "train.schedule={kind: constant, warmup_steps: 0}",
    )
    run = bench.train(*words)
    inputs = prepare_inputs(load_recipe(str(bench.recipe), words), say=lambda text: None)
    stream = Stream(inputs.data_directory, seed=3, global_batch_samples=16)
    base_model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(base_model, folder, is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0, betas=(0.9, 0.95))
    losses = []
    for step in range(8):
        batch = {k: torch.from_numpy(v) for k, v in stream.at(step, Share(0, 16)).items()}
        seen = batch["document_ids"] >= 0
        scores = model(input_ids=batch["input_ids"].long(), attention_mask=seen.long()).logits
        loss = cross_entropy(scores.flatten(0, 1), batch["labels"].long().flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert largest_difference(run.losses, losses) < 2e-5
    ours = load_file(run.path / "adapter/adapter_model.safetensors")
    wanted = peft.get_peft_model_state_dict(model)
    assert ours.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(ours[name], value, rtol=1e-3, atol=2e-4), name


@pytest.mark.quick(1)
def test_only_the_adapter_is_saved_and_goes_on(bench: Bench, base: Path) -> None:
    words = adapted(base, "{rank: 4}")
    straight = bench.run(*words)
    halted = bench.train(*words, "train.stop_after_steps=4")
    saved = sum(f.stat().st_size for f in halted.path.glob("checkpoints/step-*/*.safetensors"))
    adapter = (straight.path / "adapter/adapter_model.safetensors").stat().st_size
    assert saved < 4 * adapter < (base / "model.safetensors").stat().st_size * 4
    done = bench.resume(halted)
    assert done.losses == straight.losses and done.weights == straight.weights


def test_merge_folds_it_in(bench: Bench, base: Path, tmp_path: Path) -> None:
    run = bench.run(*adapted(base, "{rank: 4}"))
    with pytest.raises(SystemExit) as left:
        main(["merge", str(run.path), "--out", str(tmp_path / "whole")])
    assert left.value.code == 0
    ours, theirs = logits(opened(tmp_path / "whole")), logits(opened(base, run.path / "adapter"))
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=2e-6)


def test_merge_writes_it_apart(bench: Bench, base: Path, tmp_path: Path) -> None:
    run = bench.run(*adapted(base, "{rank: 4}"))
    for source, status in ((run.path, 0), (base.parent, 2)):
        with pytest.raises(SystemExit) as left:
            main(["merge", str(source), "--out", str(tmp_path / f"apart-{status}"), "--adapter"])
        assert left.value.code == status
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path / "apart-0", run.path / "adapter")
    )
    assert ours.keys() == theirs.keys() and all(ours[n].equal(theirs[n]) for n in ours)


def test_another_base_is_no_resume(bench: Bench, tmp_path: Path) -> None:
    import shutil

    base = tmp_path / "base"
    shutil.copytree(bench.run("train.steps=4").path / "model", base)
    run = bench.train(*adapted(base, "{rank: 4}"), "train.stop_after_steps=4")
    shutil.copy(bench.run("train.steps=2").path / "model/model.safetensors", base)
    with pytest.raises(RunError, match="its model folder is not what step 4 was trained on"):
        bench.resume(run)


def test_a_classifier_is_trained_beside(bench: Bench, tmp_path: Path) -> None:
    """The new head is no adapter: trained whole, saved apart as peft's modules_to_save."""
    lines = [{"text": f"{w} tale {n}", "label": w} for n in range(40) for w in ("good", "bad")]
    path = tmp_path / "opinions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = bench.run("train.steps=4").path / "model"
    words = ("task={kind: sequence-classification}", f"data.source={path}", "data.packing=false")
    run = bench.train(*adapted(base, "{rank: 4}"), *words)
    tensors = load_file(run.path / "adapter/adapter_model.safetensors")
    assert "base_model.model.score.weight" in tensors
    about = json.loads((run.path / "adapter/adapter_config.json").read_text())
    assert about["modules_to_save"] == ["score"] and about["task_type"] == "SEQ_CLS"
    assert run.losses[-1] < run.losses[0]


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("q_prog", r"'q_prog' matches no linear layer(.|\n)*q_proj"),
        ("lm_head", "shares its weight with another layer"),
    ],
)
def test_targets_that_match_nothing(bench: Bench, targets: str, said: str) -> None:
    base, out = bench.run("train.steps=4").path / "model", bench.new_path()
    with pytest.raises(UserError, match=said):
        bench.train(*adapted(base, f"{{targets: [{targets}]}}"), out=out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"r": 0}, "r is 0, expected a whole number"),
        ({"use_rslora": True}, "use_rslora is True, which shoal does not compute"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        (None, "cannot be read"),
    ],
)
def test_folders_that_are_refused(
    bench: Bench, tmp_path: Path, change: dict[str, object] | None, said: str
) -> None:
    base = bench.run("train.steps=4").path / "model"
    folder = drawn_by_peft(base, tmp_path / "drawn")
    path = folder / "adapter_config.json"
    text = "{" if change is None else json.dumps({**json.loads(path.read_text()), **change})
    path.write_text(text)
    with pytest.raises(ModelError, match=said):
        bench.train(*adapted(base, f"{{path: {folder}}}"))


def test_an_adapter_of_another_model(bench: Bench, tmp_path: Path) -> None:
    base = bench.run("train.steps=4").path / "model"
    folder = drawn_by_peft(bench.run("train.steps=4", GPT2).path / "model", tmp_path / "drawn")
    with pytest.raises(UserError, match=r"matches no linear layer"):
        bench.train(*adapted(base, f"{{path: {folder}}}"))


def test_an_adapter_that_is_no_folder(bench: Bench, tmp_path: Path) -> None:
    base = bench.run("train.steps=4").path / "model"
    with pytest.raises(ModelError, match=r"holds no adapter_config\.json"):
        bench.train(*adapted(base, f"{{path: {tmp_path}}}"))
