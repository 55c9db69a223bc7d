"""Turns a Whisper model in the format of CTranslate2 (faster-whisper) into a Hugging Face folder.

The file is a header, then name, shape, type and bytes of each tensor; every number is kept.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.data.binary import Reader
from shoal.errors import FetchError

_TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
_HEAD_SIZE = 64  # of every Whisper

Arrays = dict[str, NDArray[Any]]


def read_tensors(path: Path) -> Arrays:
    """Tensors by name. Raises FetchError for a file that is no such model, or cut short."""
    reader = Reader(path.read_bytes())
    number = reader.number

    def text() -> str:
        return str(reader.raw(number("H")).rstrip(b"\0").decode())

    tensors: Arrays = {}
    try:
        number("I"), text(), number("I")  # version of the format, name and revision of the model
        for _ in range(number("I")):
            name, shape = text(), [number("I") for _ in range(number("B"))]
            kind, size = np.dtype(_TYPES[number("B")]), number("I")
            tensors[name] = reader.array(kind, size // kind.itemsize).reshape(shape)
    except (struct.error, ValueError, KeyError, UnicodeDecodeError) as error:
        raise FetchError(
            f"{path}: expected a model in the format of CTranslate2, got something else or a part "
            f"of one ({error}); delete its folder to fetch it again"
        ) from error
    return tensors


def convert(path: Path, *, into: Path) -> None:
    """Write config, weights and tokenizer of the model at `path`, its tokenizer.json beside it."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    tensors = read_tensors(path)
    width, mels, _ = tensors["encoder/conv1/weight"].shape
    layers = {
        side: sum(
            each.startswith(side) and each.endswith("ffn/linear_0/weight") for each in tensors
        )
        for side in ("encoder", "decoder")
    }
    special = {
        each["content"]: each["id"]
        for each in json.loads((path.parent / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    }
    end = special["<|endoftext|>"]
    config = WhisperConfig(
        vocab_size=len(tensors["decoder/embeddings/weight"]),
        d_model=width,
        num_mel_bins=mels,
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        encoder_attention_heads=width // _HEAD_SIZE,
        decoder_attention_heads=width // _HEAD_SIZE,
        encoder_ffn_dim=len(tensors["encoder/layer_0/ffn/linear_0/weight"]),
        decoder_ffn_dim=len(tensors["decoder/layer_0/ffn/linear_0/weight"]),
        max_source_positions=len(tensors["encoder/position_encodings/encodings"]),
        max_target_positions=len(tensors["decoder/position_encodings/encodings"]),
        decoder_start_token_id=special["<|startoftranscript|>"],
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end),
    )
    model = WhisperForConditionalGeneration(config)
    named = named_as_whisper(tensors, layers=layers)
    found = {name: torch.from_numpy(each.astype(np.float32)) for name, each in named.items()}
    model.load_state_dict(found)  # every parameter is there, and nothing else
    model.save_pretrained(into)
    (into / "tokenizer.json").write_bytes((path.parent / "tokenizer.json").read_bytes())
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|endoftext|>", **names}
    (into / "tokenizer_config.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def named_as_whisper(tensors: Arrays, *, layers: dict[str, int]) -> Arrays:
    """The tensors under the names of transformers; those that are stacked there are parted.

    Queries, keys and values lie in one matrix; the bias of keys, which Whisper has not, is zeros.
    """
    found: Arrays = {}

    def linear(name: str, source: str, *, parts: str = "") -> None:
        weight, bias = tensors[f"{source}/weight"], tensors[f"{source}/bias"]
        pieces = [f"{name}.{part}_proj" for part in parts] or [name]
        for piece, rows, some in zip(
            pieces, np.split(weight, len(pieces)), np.split(bias, len(pieces))
        ):
            found[f"{piece}.weight"] = rows
            if not piece.endswith(".k_proj"):
                found[f"{piece}.bias"] = some

    def norm(name: str, source: str) -> None:
        found[f"{name}.weight"] = tensors[f"{source}/gamma"]
        found[f"{name}.bias"] = tensors[f"{source}/beta"]

    for conv in ("conv1", "conv2"):
        linear(f"model.encoder.{conv}", f"encoder/{conv}")
    for side, count in layers.items():
        positions = tensors[f"{side}/position_encodings/encodings"]
        found[f"model.{side}.embed_positions.weight"] = positions
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for number in range(count):
            name, source = f"model.{side}.layers.{number}", f"{side}/layer_{number}"
            linear(f"{name}.self_attn", f"{source}/self_attention/linear_0", parts="qkv")
            linear(f"{name}.self_attn.out_proj", f"{source}/self_attention/linear_1")
            norm(f"{name}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
            if side == "decoder":
                linear(f"{name}.encoder_attn.q_proj", f"{source}/attention/linear_0")
                linear(f"{name}.encoder_attn", f"{source}/attention/linear_1", parts="kv")
                linear(f"{name}.encoder_attn.out_proj", f"{source}/attention/linear_2")
                norm(f"{name}.encoder_attn_layer_norm", f"{source}/attention/layer_norm")
            linear(f"{name}.fc1", f"{source}/ffn/linear_0")
            linear(f"{name}.fc2", f"{source}/ffn/linear_1")
            norm(f"{name}.final_layer_norm", f"{source}/ffn/layer_norm")
    embedding = tensors["decoder/embeddings/weight"]
    return {
        **found,
        "model.decoder.embed_tokens.weight": embedding,
        "proj_out.weight": embedding,
    }
