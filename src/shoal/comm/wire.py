"""What a donor and a receiver say to each other: msgspec structures with limits, and raw bytes."""

from __future__ import annotations

from math import prod
from typing import Annotated

import msgspec
import torch
import xxhash
from torch import Tensor

from shoal.errors import ChannelError

LARGEST_HEADER = 16 << 20
"""Bytes of names, hashes and facts."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]


class Request(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What a receiver asks for: the header, or one chunk of one tensor."""

    generation: Count
    tensor: Annotated[int, msgspec.Meta(ge=-1, le=1 << 20)] = -1
    """-1: the header."""
    chunk: Count = 0


class TensorHead(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One tensor of the state."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
    dtype: Annotated[str, msgspec.Meta(max_length=8)]
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=16)]
    hash: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
    """xxh3, 64 bits, of the bytes."""

    @property
    def num_bytes(self) -> int:
        """Raises ChannelError for a dtype or a shape that no state has."""
        if self.dtype not in DTYPES:
            raise ChannelError(f"{self.name}: dtype {self.dtype!r} is not one of {list(DTYPES)}")
        if prod(max(1, size) for size in self.shape) > 1 << 48:  # a 0 would hide the others
            raise ChannelError(f"{self.name}: no tensor has the shape {list(self.shape)}")
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class Header(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What a state consists of."""

    generation: Count
    total_bytes: Count
    tensors: Annotated[tuple[TensorHead, ...], msgspec.Meta(max_length=1 << 20)]
    facts: Annotated[str, msgspec.Meta(max_length=LARGEST_HEADER)]
    """JSON."""


class Answer(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Goes before the bytes asked for; `problem` stands instead of them."""

    tensor: int
    chunk: int
    problem: Annotated[str, msgspec.Meta(max_length=1024)] = ""


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor: its own memory where it is contiguous and on the CPU."""
    plain = tensor.detach().to("cpu").contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data


def hash_of(data: memoryview) -> str:
    return xxhash.xxh3_64(data).hexdigest()
