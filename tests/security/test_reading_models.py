"""Rule: one reader of model folders, for every command: what training refuses, they all refuse."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_code import write_folder_with_code
from test_paths import model_of, write_indexed
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from shoal.errors import ModelError, ShoalError, UserError
from shoal.serve.generate import continue_prompt
from shoal.serve.reading import read_model
from tiny import Bench

CAUSAL = "AutoModelForCausalLM"
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32,
    "max_position_embeddings": 24,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder that is right: 32 tokens, one letter each."""
    home = tmp_path / "model"
    write_indexed(home)
    draw = torch.Generator().manual_seed(0)
    for file in home.glob("*.safetensors"):
        kept = load_file(file)
        save_file({n: torch.randn(v.shape, generator=draw) for n, v in kept.items()}, file)
    (home / "config.json").write_text(json.dumps(CONFIG))
    letters = {letter: number for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz012345")}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(home / "tokenizer.json"))
    return home


def answer(folder: Path, *, prompt: str = "hello", tokens: int = 6, seed: int = 1) -> str:
    return continue_prompt(folder, prompt=prompt, tokens=tokens, temperature=0.8, seed=seed)


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_folder_of_these_tests_is_read(folder: Path) -> None:
    """And its logits are those of transformers' own reader."""
    from transformers import AutoModelForCausalLM

    ids = torch.arange(8)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(str(folder), use_safetensors=True)
        ours = read_model(folder, auto_class=CAUSAL)
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-6)
    assert len(answer(folder)) == 6 and answer(folder) == answer(folder)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    answer(folder)
    assert torch.equal(before, torch.random.get_rng_state()), "the caller's numbers stay"


def outside(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    away = folder.parent / "outside"
    away.mkdir()
    for file in set(names.values()):
        (away / file).write_bytes((folder / file).read_bytes())
    index.write_text(json.dumps({"weight_map": {n: f"../outside/{f}" for n, f in names.items()}}))


def missing(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    names.pop("lm_head.weight")
    index.write_text(json.dumps({"weight_map": names}))


def cut_short(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-9])


def with_config(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (outside, "which is not a file of this folder"),
        (missing, "it lacks lm_head.weight, which only training may draw at random"),
        (cut_short, "damaged or not a safetensors file"),
        (with_config("{"), "not valid JSON"),
        (with_config("[]"), "expected a JSON object"),
        (with_config('{"model_type": []}'), "it names no model_type"),
        (with_config('{"model_type": "lama"}'), "did you mean 'llama'"),
        (with_config(json.dumps({**CONFIG, "num_attention_heads": "x"})), "config.json"),
        (with_config(json.dumps({**CONFIG, "rope_parameters": []})), "config.json"),
        (with_config(json.dumps({**CONFIG, "hidden_size": 20})), "has shape"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "is not a tokenizer"),
        (lambda f: (f / "tokenizer.json").unlink(), "it has no tokenizer"),
        (lambda f: (f / "generation_config.json").write_text("[]"), "not the settings of a model"),
        (lambda f: (f / "generation_config.json").write_text("{"), "not the settings of a model"),
    ],
)
def test_a_damaged_or_hostile_folder_is_refused(
    folder: Path, damage: Callable[[Path], object], said: str
) -> None:
    damage(folder)
    with pytest.raises(ShoalError) as error:
        answer(folder)
    assert isinstance(error.value, UserError) and said in str(error.value)
    assert str(folder) in str(error.value) or "llama" in said, "it names the file"


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_no_kernel_that_a_folder_names_is_fetched(folder: Path, key: str) -> None:
    """transformers loads `owner/name` as a kernel of the hub: code of whoever wrote the folder."""
    before = answer(folder)
    rewrite(folder / "config.json", **{key: "evil/kernel"})
    assert answer(folder) == before
    assert read_model(folder, auto_class=CAUSAL).config._attn_implementation == "eager"


def test_code_in_a_folder_is_ignored(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "code-was-run"
    write_folder_with_code(folder, mark, known=True)
    assert len(answer(folder)) == 6 and not mark.exists()


def test_a_model_without_the_head_is_no_language_model(tmp_path: Path, folder: Path) -> None:
    rewrite(folder / "config.json", model_type="vit")
    with pytest.raises(ModelError, match="cannot build a 'vit' as AutoModelForCausalLM"):
        answer(folder)


def test_an_answer_ends_at_the_end_token(folder: Path) -> None:
    """As generation_config.json says, else config.json; without one, at the length asked for."""
    whole = answer(folder, tokens=12)
    third = ord(whole[2]) - ord("a") if whole[2].isalpha() else 26 + int(whole[2])
    cut = whole[: whole.index(whole[2]) + 1]
    rewrite(folder / "config.json", eos_token_id=third)
    assert answer(folder, tokens=12) == cut
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [third, 31]}))
    rewrite(folder / "config.json", eos_token_id=None)
    assert answer(folder, tokens=12) == cut
    assert len(whole) == 12


def test_prompts_that_the_model_has_no_room_for(folder: Path) -> None:
    assert len(answer(folder, prompt="hello", tokens=100)) == 24 - 5, "the positions end there"
    with pytest.raises(UserError, match="the prompt has 24 tokens, and the model's positions end"):
        answer(folder, prompt="abcdefghijklmnopqrstuvwx")
    with pytest.raises(UserError, match="the prompt is empty"):
        answer(folder, prompt="")


def test_it_is_the_model_of_the_other_tests() -> None:
    assert model_of(Path()).config.hidden_size == CONFIG["hidden_size"]


def test_evaluate_reads_with_the_same_reader(bench: Bench, tmp_path: Path) -> None:
    """In a worker, which has training's reader and would draw what is missing."""
    folder = tmp_path / "model"
    shutil.copytree(bench.run().path / "model", folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    done = bench.command("evaluate", folder, bench.recipe)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{folder}: it lacks model.norm.weight, which only training may draw" in done.stderr


@pytest.mark.parametrize(
    "text", ["[]", '"x"', "{", "[" * 100_000], ids=["list", "text", "cut", "deep"]
)
def test_train_refuses_such_a_folder_before_workers_start(
    bench: Bench, tmp_path: Path, text: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bench.run().path / "model", folder)
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(str(folder / "config.json"))):
        bench.train(f"model.path={folder}")
