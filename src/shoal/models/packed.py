"""Quantised weights as compressed-tensors stores them.

Its forms `pack-quantized` and `int-quantized`, which vLLM and transformers read
(https://github.com/neuralmagic/compressed-tensors).

Packed: of a layer's weight [O, I] a folder holds `weight_packed` int32 [O, I x bits / 32], each
code plus 2^(bits-1) in so many bits, the first one lowest; `weight_scale` [O, groups]; and
`weight_shape`. With whole numbers for inputs too: `weight` int8 [O, I] and `weight_scale` [O, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.errors import ModelError

METHOD = "compressed-tensors"
FORMAT, WHOLE = "pack-quantized", "int-quantized"
PACKED = ".weight_packed"
SCALE = ".weight_scale"
BESIDE = (SCALE, ".weight_shape")


@dataclass(frozen=True)
class Scheme:
    """How the weights of a folder are stored."""

    bits: int
    dynamic: bool = False
    """Inputs are rounded too, each token by its own largest."""


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


def settings(
    *, bits: int, group: int | None, ignore: Sequence[str], dynamic: bool = False
) -> dict[str, Any]:
    """What config.json says of weights so stored (`quantization_config`).

    `dynamic`: inputs are rounded to 8 bits too, with a scale for each token that is found when it
    is computed.
    """
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "dynamic": False,
    }
    told: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if dynamic:
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"}
        told["input_activations"] = {**inputs, "dynamic": True}
    return {
        "quant_method": METHOD,
        "format": WHOLE if dynamic else FORMAT,
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": {"group_0": told},
    }


def scheme_of(said: Mapping[str, Any], *, where: str) -> Scheme:
    """How weights are stored, from config.json. Raises ModelError for what is not known here."""
    try:
        form = said.get("format")
        if said.get("quant_method") != METHOD or form not in (FORMAT, WHOLE):
            raise ValueError(f"{said.get('quant_method')}, {form}")
        (group,) = said["config_groups"].values()
        weights, inputs = group["weights"], group.get("input_activations")
        bits = int(weights["num_bits"])
        plain = weights["type"] == "int" and weights["symmetric"] and not weights.get("actorder")
        if bits not in (4, 8) or not plain:
            raise ValueError(f"{bits} bits, {weights['type']}")
        if form == WHOLE and (bits, weights["strategy"]) != (8, "channel"):
            raise ValueError(f"{form} with {bits} bits by {weights['strategy']}")
        if (form == WHOLE) != bool(inputs):
            raise ValueError(f"{form}, inputs {inputs}")
        if inputs and not (
            inputs["dynamic"]
            and (inputs["num_bits"], inputs["type"], inputs["strategy"]) == (8, "int", "token")
            and inputs["symmetric"]
        ):
            raise ValueError(f"inputs {inputs['strategy']} of {inputs['num_bits']} bits")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{where}: its weights are quantised in a way that is not known here ({error})\n"
            f"    known: {METHOD}, symmetric whole numbers of 4 or 8 bits ({FORMAT}), or of 8 with "
            f"inputs by token ({WHOLE})"
        ) from None
    return Scheme(bits, bool(inputs))
