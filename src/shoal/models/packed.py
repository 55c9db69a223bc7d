"""Quantised weights as compressed-tensors stores them.

Its form `pack-quantized`, which vLLM and transformers read
(https://github.com/neuralmagic/compressed-tensors).

Of a layer's weight [O, I] a folder holds `weight_packed` int32 [O, I x bits / 32], each code plus
2^(bits-1) in so many bits, the first one lowest; `weight_scale` [O, groups]; and `weight_shape`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.errors import ModelError

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
PACKED = ".weight_packed"
BESIDE = (".weight_scale", ".weight_shape")


def pack(codes: Tensor, *, bits: int) -> Tensor:
    """int8 [O, I] -> int32 [O, ceil(I / n)], n = 32 / bits codes in each."""
    each = 32 // bits
    plus = codes.numpy().astype(np.int64) + (1 << (bits - 1))
    rows, count = plus.shape
    padded = np.zeros((rows, -(-count // each) * each), dtype=np.uint32)
    padded[:, :count] = plus
    shifts = np.arange(each, dtype=np.uint32) * np.uint32(bits)
    words = (padded.reshape(rows, -1, each) << shifts).sum(axis=2, dtype=np.uint32)
    return torch.from_numpy(words.view(np.int32))


def unpack(words: Tensor, *, bits: int, inputs: int) -> Tensor:
    """The inverse of `pack`: int8 [O, inputs]."""
    each = 32 // bits
    shifts = np.arange(each, dtype=np.uint32) * np.uint32(bits)
    parts = (words.numpy().view(np.uint32)[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)
    codes = parts.reshape(len(words), -1)[:, :inputs].astype(np.int16) - (1 << (bits - 1))
    return torch.from_numpy(codes.astype(np.int8))


def weight_of(words: Tensor, scales: Tensor, *, bits: int, shape: Sequence[int]) -> Tensor:
    """The weight [O, I], float32."""
    codes = unpack(words, bits=bits, inputs=shape[1])
    return codes.float() * scales.float().repeat_interleave(shape[1] // scales.shape[1], dim=1)


def settings(*, bits: int, group: int | None, ignore: Sequence[str]) -> dict[str, Any]:
    """What config.json says of weights so stored (`quantization_config`)."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "dynamic": False,
    }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def bits_of(said: Mapping[str, Any], *, where: str) -> int:
    """Bits of a code, from config.json. Raises ModelError for what is stored in another way."""
    try:
        if said.get("quant_method") != METHOD or said.get("format") != FORMAT:
            raise ValueError(f"{said.get('quant_method')}, {said.get('format')}")
        (group,) = said["config_groups"].values()
        weights = group["weights"]
        bits = int(weights["num_bits"])
        plain = (
            weights["type"] == "int" and weights["symmetric"] and not group.get("input_activations")
        )
        if bits not in (4, 8) or not plain or weights.get("actorder"):
            raise ValueError(f"{bits} bits, {weights['type']}")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{where}: its weights are quantised in a way that is not known here ({error})\n"
            f"    known: {METHOD}, {FORMAT}, symmetric whole numbers of 4 or 8 bits"
        ) from None
    return bits
