"""A model as one GGUF file, which llama.cpp opens: names, order of rows, sizes, tokenizer.

The container is written by the package gguf (extra `gguf`). Names are its tables' and what a
family needs beside them is what llama.cpp's own converter does (convert_hf_to_gguf.py): Llama's
rows of queries and keys are reordered for its rotation, GPT-2's layers are turned round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shoal.compress import ggml
from shoal.compress.gguf_words import Words, words_of
from shoal.errors import UserError
from shoal.models.adapter import matrix_of
from shoal.models.anatomy import canonical_parameters
from shoal.models.grid import Coded
from shoal.models.placement import is_transposed

KINDS = {"gguf-f16": "f16", "gguf-q8_0": "q8_0", "gguf-q4_0": "q4_0", "gguf-q4_1": "q4_1"}
FILE = "model.gguf"
_FILE_TYPES = {"f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7}
"""`general.file_type` of each."""
_FAMILIES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gpt2": "GPT2",
}
"""transformers' model_type -> llama.cpp's architecture."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the file."""

    name: str
    """In the file."""
    path: str
    """Of its module in the model."""
    leaf: str
    """`weight` or `bias`."""
    kind: str
    """`f32`, `f16`, or of ggml's blocks."""
    heads: int = 0
    """Of rows that are reordered for llama.cpp's rotation; 0: they stay."""


def check(config: Any, folder: Path) -> Words:
    """What is known before anything is computed: the family and the tokenizer. UserError."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError(
            "GGUF files are written by the package gguf, which is not installed\n"
            "    run `pip install 'shoal[gguf]'`"
        ) from None
    family = config.model_type
    if family not in _FAMILIES:
        raise UserError(
            f"{family}: its names in GGUF are not known here; known: {', '.join(_FAMILIES)}\n"
            "    nearest: --quantise int8, a folder that transformers and vLLM open"
        )
    sliding = getattr(config, "sliding_window", None)
    used = getattr(config, "use_sliding_window", True)
    if sliding and used and sliding < config.max_position_embeddings:
        raise UserError(
            f"{family}: llama.cpp has no sliding window for it, and this model's is {sliding} "
            f"of {config.max_position_embeddings} tokens\n    nearest: --quantise int8"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        raise UserError(
            f"{family}: positions scaled by {rope['rope_type']!r} are not written to GGUF yet\n"
            "    known: default, linear, llama3; nearest: --quantise int8"
        )
    return words_of(folder, vocabulary=config.vocab_size)


def entries_of(model: nn.Module, kind: str) -> list[Entry]:
    """What the file holds, in the model's order. Raises UserError for a weight without a name."""
    import gguf

    config: Any = model.config
    family = config.model_type
    count = config.num_hidden_layers
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, _FAMILIES[family]), count)
    entries = []
    for full in canonical_parameters(model):
        path, _, leaf = full.rpartition(".")
        name = table.get_name(full, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(
                f"{family}: {full} has no name in GGUF\n    nearest: --quantise int8, a folder"
            )
        heads = 0
        if _FAMILIES[family] == "LLAMA":
            last = path.rpartition(".")[2]
            heads = {
                "q_proj": config.num_attention_heads,
                "k_proj": config.num_key_value_heads,
            }.get(last, 0)
        entries.append(Entry(name, path, leaf, _kind_of(model, path, leaf, kind), heads))
    return entries


def _kind_of(model: nn.Module, path: str, leaf: str, kind: str) -> str:
    """How a tensor is stored: vectors whole, tables of words by 8 bits where the rest has 4."""
    module = model.get_submodule(path)
    value = getattr(module, leaf)
    if value.dim() < 2:
        return "f32"
    if kind == "f16":
        return "f16"
    if matrix_of(module).shape[-1] % ggml.WIDTH:
        return "f16"
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    if isinstance(module, nn.Embedding) and module is not tables[0]:
        return "f32"  # positions: llama.cpp adds them as they are
    return "q8_0" if any(module is each for each in tables) else kind


@torch.no_grad()
def encode(model: nn.Module, kind: str, coded: Mapping[str, Coded]) -> dict[str, np.ndarray]:
    """The bytes of every tensor by name, and `model` made into what they stand for, in place.

    `coded`: layers by path that are on a grid already (of 32 inputs, its scales of 16 bits).
    Raises UserError for a weight that 16 bits cannot hold.
    """
    stored = {}
    for entry in entries_of(model, kind):
        matrix = _matrix(model, entry)
        values = np.ascontiguousarray(matrix.float().numpy())
        if entry.kind in ggml.BYTES:
            on_grid = coded.get(entry.path)
            if on_grid is not None and entry.leaf == "weight" and entry.kind != "q4_1":
                raw = ggml.from_codes(on_grid.codes.numpy(), on_grid.scales.numpy(), entry.kind)
            else:
                raw = ggml.encode(values, entry.kind)
            matrix.copy_(torch.from_numpy(ggml.decode(raw, entry.kind)))
        elif entry.kind == "f16":
            if np.abs(values).max(initial=0.0) > float(np.finfo(np.float16).max):
                raise UserError(
                    f"{entry.path}.{entry.leaf} holds {np.abs(values).max():.3g}, above what 16 "
                    "bits hold (65504)\n    nearest: --quantise gguf-q8_0 or int8"
                )
            raw = values.astype(np.float16)
            matrix.copy_(torch.from_numpy(raw.astype(np.float32)))
        else:
            raw = values
        stored[entry.name] = _reordered(raw, entry.heads)
    return stored


def _matrix(model: nn.Module, entry: Entry) -> Tensor:
    module = model.get_submodule(entry.path)
    value: Tensor = getattr(module, entry.leaf)
    return matrix_of(module) if value.dim() == 2 and is_transposed(module) else value


def _reordered(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head: transformers rotates i with i + d/2, llama.cpp 2i with 2i + 1."""
    if not heads:
        return rows
    parts = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(parts.swapaxes(1, 2)).reshape(rows.shape)


def _restored(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `_reordered`."""
    if not heads:
        return rows
    parts = rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(parts.swapaxes(1, 2)).reshape(rows.shape)


def write(
    file: Path,
    model: nn.Module,
    *,
    kind: str,
    stored: Mapping[str, np.ndarray],
    words: Words,
    name: str,
) -> None:
    """Write the tensors of `encode` with what llama.cpp needs to know of the model."""
    import gguf

    config: Any = model.config
    writer = gguf.GGUFWriter(str(file), gguf.MODEL_ARCH_NAMES[_arch(config)])
    _describe(writer, config, kind=kind, name=name)
    _describe_words(writer, words)
    types = gguf.GGMLQuantizationType
    for entry in entries_of(model, kind):
        raw_dtype = types[entry.kind.upper()] if entry.kind in ggml.BYTES else None
        writer.add_tensor(entry.name, stored[entry.name], raw_dtype=raw_dtype)
    factors = _rotation_factors(model)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _arch(config: Any) -> Any:
    import gguf

    return getattr(gguf.MODEL_ARCH, _FAMILIES[config.model_type])


def _describe(writer: Any, config: Any, *, kind: str, name: str) -> None:
    import gguf

    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    calls: list[tuple[Callable[..., None], Any]] = [
        (writer.add_name, name),
        (writer.add_file_type, _FILE_TYPES[kind]),
        (writer.add_quantization_version, gguf.GGML_QUANT_VERSION),
        (writer.add_block_count, config.num_hidden_layers),
        (writer.add_context_length, config.max_position_embeddings),
        (writer.add_embedding_length, config.hidden_size),
        (writer.add_feed_forward_length, inner or 4 * config.hidden_size),
        (writer.add_head_count, heads),
        (writer.add_vocab_size, config.vocab_size),
    ]
    if config.model_type == "gpt2":
        calls += [(writer.add_layer_norm_eps, config.layer_norm_epsilon)]
    else:
        rope = getattr(config, "rope_parameters", None) or {}
        calls += [
            (writer.add_head_count_kv, groups),
            (writer.add_layer_norm_rms_eps, config.rms_norm_eps),
            (writer.add_rope_freq_base, rope.get("rope_theta", 10000.0)),
            (writer.add_rope_dimension_count, size),
            (writer.add_key_length, size),
            (writer.add_value_length, size),
        ]
        if rope.get("rope_type") == "linear":
            calls += [
                (writer.add_rope_scaling_type, gguf.RopeScalingType.LINEAR),
                (writer.add_rope_scaling_factor, rope["factor"]),
            ]
    for call, value in calls:
        call(value)


def _rotation_factors(model: nn.Module) -> np.ndarray | None:
    """What divides each frequency of Llama 3's scaled positions [head size / 2]; None: nothing."""
    config: Any = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    scaled: Any = next(each.inv_freq for each in model.modules() if hasattr(each, "inv_freq"))
    powers = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled))
    factors: np.ndarray = (1.0 / rope["rope_theta"] ** powers / scaled).float().numpy()
    return factors


def _describe_words(writer: Any, words: Words) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    writer.add_token_merges(words.merges)
    add = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "pad": writer.add_pad_token_id,
        "unk": writer.add_unk_token_id,
    }
    for short, number in words.specials.items():
        add[short](number)
    writer.add_add_bos_token(words.adds_bos)
    writer.add_add_space_prefix(False)
    if words.template:
        writer.add_chat_template(words.template)


@torch.no_grad()
def read_again(file: Path, model: nn.Module, kind: str) -> None:
    """Put into `model` what the file holds, by the gguf package's own reader, in place."""
    import gguf

    held = {each.name: each for each in gguf.GGUFReader(str(file)).tensors}
    for entry in entries_of(model, kind):
        tensor = held[entry.name]
        values = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        matrix = _matrix(model, entry)
        matrix.copy_(torch.from_numpy(_restored(values, entry.heads)).view(matrix.shape))
