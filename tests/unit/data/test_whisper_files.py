"""A model in the format of CTranslate2 becomes a folder with the same numbers."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperForConditionalGeneration

from shoal.data import whisper
from shoal.errors import FetchError
from sounds import write_whisper


def packed(weights: dict[str, np.ndarray]) -> bytes:
    """In version 6 of the format, as faster-whisper has it."""
    text = lambda word: struct.pack("<H", len(word) + 1) + word.encode() + b"\0"  # noqa: E731
    content = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(weights))
    for name, value in weights.items():
        shape = struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        content += text(name) + shape + struct.pack("<BI", 4, value.nbytes) + value.tobytes()
    return content + struct.pack("<I", 0)


def stacked(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The weights of a Whisper of two layers under CTranslate2's names, in float16."""
    half = {name: value.numpy().astype("<f2") for name, value in state.items()}
    found: dict[str, np.ndarray] = {}

    def put(name: str, *sources: str, kinds: tuple[str, str] = ("weight", "bias")) -> None:
        weights = [half[f"model.{source}.weight"] for source in sources]
        empty = np.zeros(len(weights[0]), dtype="<f2")
        biases = [half.get(f"model.{source}.bias", empty) for source in sources]
        found[f"{name}/{kinds[0]}"], found[f"{name}/{kinds[1]}"] = map(
            np.concatenate, (weights, biases)
        )

    norm = ("gamma", "beta")
    for number in (1, 2):
        put(f"encoder/conv{number}", f"encoder.conv{number}")
    for side in ("encoder", "decoder"):
        found[f"{side}/position_encodings/encodings"] = half[f"model.{side}.embed_positions.weight"]
        put(f"{side}/layer_norm", f"{side}.layer_norm", kinds=norm)
        for number in range(2):
            to, of = f"{side}/layer_{number}", f"{side}.layers.{number}"
            attention = f"{of}.self_attn"
            put(f"{to}/self_attention/linear_0", *(f"{attention}.{x}_proj" for x in "qkv"))
            put(f"{to}/self_attention/linear_1", f"{attention}.out_proj")
            put(f"{to}/self_attention/layer_norm", f"{of}.self_attn_layer_norm", kinds=norm)
            if side == "decoder":
                attention = f"{of}.encoder_attn"
                put(f"{to}/attention/linear_0", f"{attention}.q_proj")
                put(f"{to}/attention/linear_1", *(f"{attention}.{x}_proj" for x in "kv"))
                put(f"{to}/attention/linear_2", f"{attention}.out_proj")
                put(f"{to}/attention/layer_norm", f"{of}.encoder_attn_layer_norm", kinds=norm)
            for linear in (0, 1):
                put(f"{to}/ffn/linear_{linear}", f"{of}.fc{linear + 1}")
            put(f"{to}/ffn/layer_norm", f"{of}.final_layer_norm", kinds=norm)
    found["decoder/embeddings/weight"] = half["model.decoder.embed_tokens.weight"]
    return found


def test_every_number_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whisper, "_HEAD_SIZE", 16)
    source = write_whisper(tmp_path / "source")
    model = WhisperForConditionalGeneration.from_pretrained(source)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases that tell one from another
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    state = model.state_dict()
    path = tmp_path / "package/model.bin"
    path.parent.mkdir()
    path.write_bytes(packed(stacked(state)))
    (path.parent / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    whisper.convert(path, into=tmp_path / "made")
    made = WhisperForConditionalGeneration.from_pretrained(tmp_path / "made")
    for name, value in made.state_dict().items():
        assert torch.equal(value, state[name].half().float()), name
    for key in ("d_model", "encoder_layers", "max_source_positions", "decoder_start_token_id"):
        assert getattr(made.config, key) == getattr(model.config, key)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(packed({"a": np.ones((4, 4), dtype="<f2")})[:50])
    with pytest.raises(FetchError, match=r"model.bin: expected a model in the format of CTransl"):
        whisper.read_tensors(path)
