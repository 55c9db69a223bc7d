"""GGUF files: blocks against the gguf package, files against transformers and llama.cpp."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from shoal.compress import ggml, gguf, gguf_words
from shoal.data.tokenize import train_tokenizer
from shoal.errors import UserError
from shoal.models.grid import Grid, nearest
from tiny import tales

PROMPT = [5, 40, 70, 71, 80, 33, 90]
END = 1
"""The end token of tokenizers that shoal trains."""
TEXTS = (
    "The lamp keeper finds 1234 apples.",
    "  Two spaces,\n\n a line;\tit's déjà vu: 北京 2026!",
)
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "llama-biased": {"attention_bias": True, "head_dim": 32},
    "llama-scaled": {"rope_parameters": LLAMA3},
    "llama-linear": {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    },
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
}
# transformers reads no size of heads of qwen3, and no number of positions of GPT-2: its defaults
ALSO = {"qwen3-wide": {"head_dim": 128}, "gpt2-long": {**FAMILIES["gpt2"], "n_positions": 1024}}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer that shoal trained."""
    return train_tokenizer(
        [tales(seed=3, documents=200)], vocabulary_size=300, cache_key="gguf-files"
    )


def a_model(kind: str) -> Any:
    """Random weights, large enough that tokens differ, and every vector drawn too."""
    torch.manual_seed(5)
    family = kind.partition("-")[0]
    sizes = {"vocab_size": 300} if family == "gpt2" else SIZES
    config = AutoConfig.for_model(family, **{**sizes, **{**FAMILIES, **ALSO}[kind]})
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def written(model: Any, words: Path, file: Path, kind: str) -> Path:
    told = gguf.check(model.config, words)
    stored = gguf.encode(model, kind, {})
    gguf.write(file, model, kind=kind, stored=stored, words=told, name="tiny")
    return file


@pytest.mark.parametrize("kind", ggml.BYTES)
def test_blocks_are_the_reference_quantisers_bytes(kind: str) -> None:
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(37, 96)) * draw.choice([1e-6, 1.0, 50.0], size=(37, 1))
    rows = rows.astype(np.float32)
    rows[0], rows[1, :32], rows[2, :4] = 0.0, 1.5, [2, -2, 2, -2]
    type_ = library.GGMLQuantizationType[kind.upper()]
    found = ggml.encode(rows, kind)
    assert np.array_equal(found, library.quants.quantize(rows, type_))
    assert np.array_equal(ggml.decode(found, kind), library.quants.dequantize(found, type_))


@pytest.mark.parametrize(("kind", "bits"), [("q8_0", 8), ("q4_0", 4)])
def test_what_is_on_a_grid_is_stored_as_it_is(kind: str, bits: int) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    coded = nearest(weight, Grid(bits, 32, half=True))
    raw = ggml.from_codes(coded.codes.numpy(), coded.scales.numpy(), kind)
    found = library.quants.dequantize(raw, library.GGMLQuantizationType[kind.upper()])
    assert np.array_equal(found, coded.weight().numpy())


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("llama", "f16"),
        ("llama", "q4_1"),
        ("qwen2", "q8_0"),
        ("qwen3-wide", "q4_0"),
        ("gpt2-long", "f16"),
    ],
)
def test_transformers_reads_what_the_model_became(
    words: Path, tmp_path: Path, kind: str, form: str
) -> None:
    model = a_model(kind)
    file = written(model, words, tmp_path / "m.gguf", form)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    )
    wanted = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    again = a_model(kind)
    gguf.read_again(file, again, form)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, wanted[name]), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gemma2"}, r"(?s)gemma2: its names in GGUF are not known.*llama, mistral"),
        ({"model_type": "mistral", "sliding_window": 16}, "this model's is 16 of 128 tokens"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "positions scaled by 'yarn' are not written",
        ),
    ],
)
def test_families_that_cannot_be_written(words: Path, config: dict[str, Any], message: str) -> None:
    family = config.pop("model_type")
    with pytest.raises(UserError, match=message):
        gguf.check(AutoConfig.for_model(family, **{**SIZES, **config}), words)


def test_a_weight_without_a_name() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.model.layers[1].register_parameter("extra", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(UserError, match=r"llama: model.layers.1.extra has no name in GGUF"):
        gguf.entries_of(model, "f16")


def test_without_the_package(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"not installed\n    run `pip install 'shoal\[gguf\]'`"):
        gguf.check(LlamaConfig(**SIZES), words)


def test_a_weight_that_16_bits_cannot_hold(words: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    with pytest.raises(UserError, match=r"up_proj.weight holds 1e\+05, above what 16 bits hold"):
        gguf.encode(model, "f16", {})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, r"no plain BPE \(WordPiece\)"),
        ({"model.byte_fallback": True}, "BPE with bytes for what it lacks"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "it does not split text by bytes"),
        ({"pre_tokenizer.add_prefix_space": True}, "puts a space before it"),
        ({"normalizer": {"type": "Lowercase"}}, "llama.cpp has no name for how it splits text"),
        ({"model.ignore_merges": True}, "ignore_merges is True beside gpt-2"),
    ],
)
def test_tokenizers_that_cannot_be_written(
    words: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    told = json.loads((words / "tokenizer.json").read_text())
    for key, value in changed.items():
        outer, _, inner = key.partition(".")
        if inner:
            told[outer][inner] = value
        else:
            told[outer] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        gguf.check(LlamaConfig(**SIZES), tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="it cannot be read"):
        gguf.check(LlamaConfig(**SIZES), tmp_path)


class LlamaCpp:
    """llama.cpp on a file, in this process."""

    def __init__(self, file: Path) -> None:
        engine = pytest.importorskip("xllamacpp")
        asked = engine.CommonParams()
        asked.model.path = str(file)
        asked.n_ctx, asked.n_parallel, asked.n_gpu_layers = 256, 1, 0
        self.server = engine.Server(asked)

    def complete(self, prompt: list[int], *, tokens: int) -> list[int]:
        """The likeliest tokens."""
        asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "top_k": 1}
        more = {"return_tokens": True, "ignore_eos": True, "cache_prompt": False}
        return list(self._post("completion", {**asked, **more})["tokens"])

    def scores(self, prompts: list[list[int]]) -> list[tuple[list[int], int, float]]:
        """Prompt, likeliest next token and its log-probability, where llama.cpp tells of it.

        It does not where the token is a part of a character.
        """
        found = []
        for prompt in prompts:
            asked = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": 1}
            answer = self._post("completion", {**asked, "cache_prompt": False})
            for first in answer.get("completion_probabilities", []):
                found.append((prompt, first["id"], first["logprob"]))
        return found

    def ids_of(self, text: str) -> list[int]:
        return list(self._post("tokenize", {"content": text})["tokens"])

    def _post(self, where: str, what: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.server.listening_address}/{where}",
            data=json.dumps(what).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return dict(json.loads(answer.read()))


@pytest.fixture
def quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """llama.cpp says much."""
    yield
    capfd.readouterr()


def apart(engine: LlamaCpp, model: Any) -> float:
    """How far llama.cpp's log-probabilities are from the model's."""
    found = engine.scores([PROMPT[:count] for count in range(2, len(PROMPT) + 1)])
    assert len(found) >= 2
    most = 0.0
    for prompt, token, score in found:
        with torch.no_grad():
            true = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        most = max(most, abs(score - float(true[token])))
    return most


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_llama_cpp_answers_as_transformers(
    words: Path, tmp_path: Path, kind: str, quiet: None
) -> None:
    """Each of its greedy tokens is the likeliest, or as likely but for 16 bits of arithmetic."""
    model = a_model(kind)
    engine = LlamaCpp(written(model, words, tmp_path / "m.gguf", "f16"))
    found = engine.complete(PROMPT, tokens=24)
    with torch.no_grad():
        scores = model(torch.tensor([PROMPT + found])).logits[0, len(PROMPT) - 1 : -1]
    scores[:, END] = -torch.inf  # which it was told to pass over
    chosen = scores.gather(1, torch.tensor(found)[:, None])[:, 0]
    assert float((scores.max(1).values - chosen).max()) < 0.02
    assert scores[:, END + 1 :].std() > 0.5, "far apart enough to tell"
    assert apart(engine, model) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("form", ["q8_0", "q4_0", "q4_1"])
def test_llama_cpp_reads_blocks(words: Path, tmp_path: Path, form: str, quiet: None) -> None:
    """As far off as rounding inputs to 8 bits, which it does besides, leads."""
    model = a_model("llama")
    engine = LlamaCpp(written(model, words, tmp_path / "m.gguf", form))
    assert apart(engine, model) < 0.1
    assert apart(engine, a_model("llama")) > (0.0 if form == "q8_0" else 0.1), "it was rounded"


SPLITS = {
    "gpt-2": [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}],
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    ],
    **{
        name: [
            {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]
        for pattern, name in gguf_words.SPLITS.items()
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_llama_cpp_splits_text_as_the_tokenizer(
    words: Path, tmp_path: Path, split: str, quiet: None
) -> None:
    told = json.loads((words / "tokenizer.json").read_text())
    told["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": SPLITS[split]}
    told["model"]["ignore_merges"] = split == "llama-bpe"
    for part in told["pre_tokenizer"]["pretokenizers"]:
        if part["type"] == "ByteLevel":
            part["trim_offsets"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    (tmp_path / "tokenizer_config.json").write_bytes((words / "tokenizer_config.json").read_bytes())
    model = a_model("llama")
    assert gguf.check(model.config, tmp_path).pre == split
    engine = LlamaCpp(written(model, tmp_path, tmp_path / "m.gguf", "f16"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert engine.ids_of(text) == tokenizer.encode(text).ids, text
