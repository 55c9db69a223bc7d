"""The codecs by kind: what `sync.codec.kind` of a recipe names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shoal.comm.codec import rounding
from shoal.comm.codec.codec import Codec, Encoding, NoCodec
from shoal.comm.codec.compression import Compression
from shoal.comm.codec.power_sgd import PowerSGD
from shoal.comm.codec.top_k import TopK, TopOfBlocks, TopOfSixteen
from shoal.comm.flat import FlatLayout
from shoal.config.sync import CodecSection, MessageCodec

_Make = Callable[[Any, FlatLayout, int, torch.device], Codec]


def _top(section: Any) -> Codec:
    if section.block is None:
        return TopK(fraction=section.fraction)
    if section.block == TopOfSixteen.block:
        return TopOfSixteen(fraction=section.fraction)
    return TopOfBlocks(fraction=section.fraction, block=section.block)


KINDS: dict[str, _Make] = {
    "none": lambda section, *_: NoCodec(),
    "bf16": lambda section, *_: rounding.Bfloat16(),
    "fp16": lambda section, *_: rounding.Float16(block=section.block),
    "int8": lambda section, *_: rounding.Int8(block=section.block, stochastic=section.stochastic),
    "int4": lambda section, *_: rounding.Int4(block=section.block, stochastic=section.stochastic),
    "sign": lambda section, *_: rounding.Sign(block=section.block),
    "topk": lambda section, *_: _top(section),
    "powersgd": lambda section, layout, numel, device: PowerSGD(
        layout, rank=section.rank, numel=numel, device=device
    ),
}
"""Every codec under its `sync.codec.kind`: from its section, the layout, elements and device."""


def create(
    section: CodecSection, layout: FlatLayout, *, like: Tensor, what: str = "gradient"
) -> Compression:
    """The codec of a recipe's section. `like`: a flat vector of the length of those summed.

    `what`: names them, and so the memory of errors.
    """
    numel = like.numel()
    codec = KINDS[section.kind](section, layout, numel, like.device)
    return Compression(
        codec,
        layout,
        numel=numel,
        like=like,
        error_feedback=section.error_feedback,
        brake=section.brake,
        after_rounds=section.after_rounds,
        what=what,
    )


def encoding(section: MessageCodec) -> Encoding | None:
    """The bare codec of a section that needs a single message; None: values go as they are."""
    made = KINDS[section.kind](section, FlatLayout.of({}), 0, torch.device("cpu"))
    return made if isinstance(made, Encoding) else None
