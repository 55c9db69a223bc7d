"""What a replica takes of memory, from its folder's files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoal.errors import ModelError

MOST_CACHE_BYTES = 2 << 30
SEQUENCES = 16
"""Whole contexts that the cache holds where nothing else was asked for."""
_OWN_BYTES = 300 << 20
"""Of a process with torch and transformers, before a model."""


def bytes_of(folder: Path, *, precision: str, int8: bool, cache_bytes: int | None) -> int:
    """Bytes of one replica at its start: weights as stored names have them, packed, and the cache.

    While a layer is packed its weight is there twice, and so is a head that an embedding shares.
    Raises ModelError for headers that cannot be read.
    """
    elements = largest = 0
    for file in sorted(folder.glob("*.safetensors")):
        for name, about in _header(file).items():
            if name == "__metadata__":
                continue
            count = 1
            for size in about["shape"]:
                count *= size
            if name.endswith("weight_packed"):  # 4 or 8 bits in int32: 4 codes at least
                count *= 4
            elements, largest = elements + count, max(largest, count)
    width = 2 if precision == "bfloat16" else 4
    packed = elements // 4 if int8 else 0
    cache = cache_of(folder, width=width) if cache_bytes is None else cache_bytes
    return elements * width + packed + 2 * largest * width + cache + _OWN_BYTES


def cache_of(folder: Path, *, width: int) -> int:
    """Bytes that a cache takes where nothing else was asked for, by config.json."""
    try:
        said: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        said = said.get("text_config") or said
        heads = int(said.get("num_attention_heads") or 1)
        keys = int(said.get("num_key_value_heads") or heads)
        size = int(said.get("head_dim") or int(said.get("hidden_size") or 0) // heads)
        layers = int(said.get("num_hidden_layers") or 0)
        context = int(said.get("max_position_embeddings") or 1 << 20)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return MOST_CACHE_BYTES
    return min(SEQUENCES * context * layers * 2 * keys * size * width, MOST_CACHE_BYTES)


def _header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError(f"a header of {length} bytes")
            found: dict[str, Any] = json.loads(opened.read(length))
            return found
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: its header cannot be read: {error}") from None
