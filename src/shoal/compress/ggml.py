"""Weights in the blocks of ggml: 32 neighbours of a row with a scale of 16 bits, and their bytes.

The rounding is that of ggml's reference quantisers (ggml-quants.c, `quantize_row_q4_0_ref` and its
kin), so a file is byte for byte what they would give. Shapes: R rows of N inputs, N a multiple of
32; a row becomes N / 32 blocks of bytes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WIDTH = 32
"""Weights of a block."""
BYTES = {"q8_0": 34, "q4_0": 18, "q4_1": 20}
"""Of a block, by kind."""

Floats = NDArray[np.float32]
Raw = NDArray[np.uint8]


def encode(rows: Floats, kind: str) -> Raw:
    """Rows [R, N] -> their bytes [R, N / 32 x bytes of a block]."""
    blocks = rows.astype(np.float32, copy=False).reshape(-1, WIDTH)
    made = {"q8_0": _q8_0, "q4_0": _q4_0, "q4_1": _q4_1}[kind](blocks)
    return made.reshape(len(rows), -1)


def decode(raw: Raw, kind: str) -> Floats:
    """The inverse of `encode`: the numbers that are stored."""
    blocks = raw.reshape(-1, BYTES[kind])
    scale = _half(blocks[:, :2])
    if kind == "q8_0":
        values = blocks[:, 2:].view(np.int8).astype(np.float32) * scale
    elif kind == "q4_0":
        values = (_nibbles(blocks[:, 2:]).astype(np.float32) - 8) * scale
    else:
        values = _nibbles(blocks[:, 4:]).astype(np.float32) * scale + _half(blocks[:, 2:4])
    return values.reshape(len(raw), -1)


def from_codes(codes: NDArray[np.int8], scales: Floats, kind: str) -> Raw:
    """Codes [R, N] with scales [R, N / 32] that 16 bits hold, as GPTQ and AWQ give them."""
    blocks = codes.reshape(-1, WIDTH)
    halves = _bytes_of(scales.reshape(-1, 1))
    if kind == "q8_0":
        stored = blocks.view(np.uint8)
    else:
        stored = _joined((blocks + np.int8(8)).astype(np.uint8))
    return np.concatenate([halves, stored], axis=1).reshape(len(codes), -1)


def _q8_0(blocks: Floats) -> Raw:
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    codes = _away_from_zero(blocks * _over(scale)).astype(np.int8)
    return np.concatenate([_bytes_of(scale), codes.view(np.uint8)], axis=1)


def _q4_0(blocks: Floats) -> Raw:
    """Scaled by the value of largest size, which becomes -8 whatever its sign."""
    place = np.abs(blocks).argmax(axis=1, keepdims=True)
    scale = np.take_along_axis(blocks, place, axis=1) / np.float32(-8)
    codes = np.trunc(blocks * _over(scale) + np.float32(8.5)).clip(0, 15).astype(np.uint8)
    return np.concatenate([_bytes_of(scale), _joined(codes)], axis=1)


def _q4_1(blocks: Floats) -> Raw:
    """From the smallest value up."""
    least = blocks.min(axis=1, keepdims=True)
    scale = (blocks.max(axis=1, keepdims=True) - least) / np.float32(15)
    codes = np.trunc((blocks - least) * _over(scale) + np.float32(0.5)).clip(0, 15)
    parts = [_bytes_of(scale), _bytes_of(least), _joined(codes.astype(np.uint8))]
    return np.concatenate(parts, axis=1)


def _over(scale: Floats) -> Floats:
    """1 / scale; 0 for 0."""
    nonzero = np.where(scale == 0, np.float32(1), scale)
    return np.where(scale == 0, np.float32(0), np.float32(1) / nonzero)


def _away_from_zero(values: Floats) -> Floats:
    """Rounded; halves away from zero, as C's roundf does."""
    size = np.abs(values)
    floor = np.floor(size)
    return np.sign(values) * (floor + np.floor(2 * (size - floor)))


def _bytes_of(values: Floats) -> Raw:
    """[n, 1] as two bytes each, in 16 bits."""
    return values.astype("<f2").view(np.uint8)


def _half(raw: Raw) -> Floats:
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _joined(codes: Raw) -> Raw:
    """[n, 32] codes of 4 bits -> [n, 16]: the first half of a block lies in the low bits."""
    return codes[:, : WIDTH // 2] | (codes[:, WIDTH // 2 :] << np.uint8(4))


def _nibbles(raw: Raw) -> Raw:
    return np.concatenate([raw & np.uint8(15), raw >> np.uint8(4)], axis=1)
