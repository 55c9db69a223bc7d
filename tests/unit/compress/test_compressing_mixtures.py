"""Mixtures of experts: what their experts see, zeros among their weights, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shoal.compress.blocks import Pruning, compress_blocks
from shoal.compress.masks import Sparsity, wanda
from shoal.compress.shorten import influences, without_blocks
from shoal.compress.walk import Walk, expert_matrices
from shoal.compress.workers import Workers
from shoal.data.tokenize import train_tokenizer
from shoal.errors import UserError
from shoal.launch.compressing import compress
from shoal.launch.compression import Wanted
from shoal.models.anatomy import anatomy_of
from shoal.models.huggingface import build_meta
from shoal.models.init import materialise, record
from shoal.observe.console import Console
from shoal.serve.reading import read_model
from tiny import tales, write_corpus

AUTO_CLASS = "AutoModelForCausalLM"
IDS = [torch.arange(start, start + 48).view(2, 24) for start in (3, 60)]
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
COUNTS = {"mixtral": {"num_local_experts": 4}, "qwen3_moe": {"num_experts": 4}}


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers(2) as found:
        yield found


def a_model(family: str) -> Any:
    config = AutoConfig.for_model(family, **SIZES, **COUNTS[family])
    model: Any = build_meta(config, auto_class=AUTO_CLASS, kernel="eager")
    return materialise(model, record=record(model), seed=0).eval()


@pytest.mark.parametrize("family", COUNTS)
def test_experts_see_the_tokens_that_chose_them(family: str, workers: Workers) -> None:
    """Each token is seen by two of them, so their sums are twice those of the whole part."""
    model = a_model(family)
    walk = Walk.begin(model, anatomy_of(model), IDS, workers)
    name = next(iter(walk.blocks))
    given: list[torch.Tensor] = []
    hook = walk.blocks[name].mlp.register_forward_pre_hook(lambda _, rows: given.append(rows[0]))
    seen = walk.watch(name, hessian=True)
    hook.remove()
    rows = torch.cat([each.flatten(0, 1) for each in given]).double()
    experts = [each for path, each in seen.items() if ".gate_up_proj." in path]
    assert len(experts) == 4 and sum(each.count for each in experts) == 2 * len(rows)
    total = sum(each.hessian for each in experts)  # type: ignore[misc]
    torch.testing.assert_close(total, 2 * rows.T @ rows, rtol=1e-4, atol=1e-5)
    counts = [each.count for path, each in seen.items() if ".down_proj." in path]
    assert counts == [each.count for each in experts]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_zeros_among_the_weights_of_experts(method: str, workers: Workers) -> None:
    model = a_model("mixtral")
    anatomy = anatomy_of(model)
    walk = Walk.begin(model, anatomy, IDS, workers)
    name = next(iter(walk.blocks))
    seen = walk.watch(name, hessian=False)
    before = {k: v.clone() for k, v in expert_matrices(walk.blocks[name], inside=name).items()}
    how = Pruning(Sparsity(0.5), method)
    assert compress_blocks(model, anatomy, IDS, how, workers=workers) == {}
    for path, matrix in expert_matrices(walk.blocks[name], inside=name).items():
        assert float((matrix == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
        if method == "wanda" and ".gate_up_proj." in path:
            # it sees what attention, pruned before it, gives: most of the same weights go
            wanted = wanda(before[path], seen[path].squares, how.sparsity)
            assert float(((wanted == 0) == (matrix == 0)).float().mean()) > 0.9


def test_a_mixture_without_a_block(workers: Workers) -> None:
    model = a_model("qwen3_moe")
    anatomy = anatomy_of(model)
    assert len(influences(model, anatomy, IDS, workers)) == 2
    config, tensors = without_blocks(model, anatomy, dropped=[0])
    short: Any = AutoModelForCausalLM.from_config(config).eval()
    short.load_state_dict(tensors, strict=False)
    del model.model.layers[0]
    model.model.layers[0].self_attn.layer_idx = 0
    with torch.no_grad():
        found, wanted = (each(input_ids=IDS[0], use_cache=False).logits for each in (short, model))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixture") / "model"
    words = train_tokenizer(
        [tales(seed=3, documents=200)], vocabulary_size=300, cache_key="mixtures"
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **SIZES, **COUNTS["qwen3_moe"])
    AutoModelForCausalLM.from_config(config).save_pretrained(out)
    for file in words.glob("tokenizer*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    return out


def test_the_command_on_a_mixture(folder: Path, tmp_path: Path) -> None:
    """It is pruned, and transformers opens what comes out; it is not rounded."""
    text = write_corpus(tmp_path / "text.txt", seed=5)

    def made(out: str, **asked: Any) -> dict[str, Any]:
        wanted = Wanted(
            model=str(folder),
            out=tmp_path / out,
            calibrate=str(text),
            samples=8,
            tokens=32,
            **asked,
        )
        with Console() as console:
            return compress(wanted, console=console)

    with pytest.raises(UserError, match=r"(?s)qwen3_moe is a mixture of experts.*wanda:0.5"):
        made("refused", quantise="int8")
    with pytest.raises(UserError, match="qwen3_moe: its names in GGUF are not known"):
        made("gguf", quantise="gguf-q8_0")
    found = made("small", prune=("heads:0.5", "wanda:0.5"))
    assert found["reload_difference"] == 0.0
    ours = read_model(tmp_path / "small", auto_class=AUTO_CLASS)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        wanted, got = (each(input_ids=ids).logits for each in (theirs, ours))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
