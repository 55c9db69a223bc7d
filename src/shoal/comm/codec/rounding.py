"""Codecs that round: to a shorter number, or to a few levels of a scale that a block shares."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.comm.codec.codec import Encoding, generator


class Bfloat16(Encoding):
    """The upper half of float32: 8 bits of precision, the same range. 2 bytes a value."""

    def num_bytes(self, numel: int) -> int:
        return 2 * numel

    def encode(self, rows: Tensor, *, key: int) -> Tensor:
        return rows.to(torch.bfloat16).view(torch.uint8)

    def decode(self, data: Tensor, *, numel: int) -> Tensor:
        return data.view(torch.bfloat16).float()


class Scaled(Encoding):
    """Codes of a block times its scale, a float32; a block that is not finite comes out as NaN.

    The scale is the largest magnitude of the block over `levels`, so no code overflows.
    `stochastic`: rounded up or down with the chance that makes the mean right, not to the nearest.
    """

    levels = 1.0

    def __init__(self, *, block: int, stochastic: bool = False) -> None:
        self.block, self.stochastic = block, stochastic

    def code_bytes(self, numel: int) -> int:
        """Bytes of the codes of `numel` values."""
        raise NotImplementedError

    def pack(self, codes: Tensor) -> Tensor:
        """Codes [n, m], within +-levels, rounded -> uint8 [n, code_bytes(m)]."""
        raise NotImplementedError

    def unpack(self, data: Tensor, *, numel: int) -> Tensor:
        """The inverse of `pack`, as float32 [n, numel]."""
        raise NotImplementedError

    def num_bytes(self, numel: int) -> int:
        return self.code_bytes(numel) + 4 * (numel // self.block)

    def scales(self, blocks: Tensor) -> Tensor:
        """Of blocks [n, m / block, block] -> [n, m / block]; NaN where a block is not finite."""
        largest = blocks.abs().amax(dim=-1)
        return torch.where(torch.isfinite(largest), largest / self.levels, torch.nan)

    def rounded(self, codes: Tensor, *, key: int) -> Tensor:
        """Whole numbers near `codes`; may change them."""
        if self.stochastic:
            draw = torch.rand(
                codes.shape, generator=generator(codes.device, key), device=codes.device
            )
            return codes.add_(draw).floor_()
        return codes.round_()

    def encode(self, rows: Tensor, *, key: int) -> Tensor:
        blocks = rows.view(len(rows), -1, self.block)
        scales = self.scales(blocks)
        codes = (blocks / scales.unsqueeze(-1)).nan_to_num_(
            0.0
        )  # an empty block, or one that is NaN
        codes = self.rounded(codes, key=key).clamp_(-self.levels, self.levels)
        packed = self.pack(codes.view(len(rows), -1))
        return torch.cat([packed, scales.contiguous().view(torch.uint8)], dim=1)

    def decode(self, data: Tensor, *, numel: int) -> Tensor:
        edge = self.code_bytes(numel)
        codes = self.unpack(data[:, :edge].contiguous(), numel=numel)
        scales = data[:, edge:].contiguous().view(torch.float32)
        blocks = codes.view(len(data), -1, self.block) * scales.unsqueeze(-1)
        return blocks.view(len(data), numel)


class Float16(Scaled):
    """float16 of values that were scaled to at most 1: 11 bits of precision, and no overflow."""

    def code_bytes(self, numel: int) -> int:
        return 2 * numel

    def rounded(self, codes: Tensor, *, key: int) -> Tensor:
        return codes

    def pack(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float16).view(torch.uint8)

    def unpack(self, data: Tensor, *, numel: int) -> Tensor:
        return data.view(torch.float16).float()


class Int8(Scaled):
    """255 levels a block."""

    levels = 127.0

    def code_bytes(self, numel: int) -> int:
        return numel

    def pack(self, codes: Tensor) -> Tensor:
        return codes.to(torch.int8).view(torch.uint8)

    def unpack(self, data: Tensor, *, numel: int) -> Tensor:
        return data.view(torch.int8).float()


class Int4(Scaled):
    """15 levels a block, two codes in a byte."""

    levels = 7.0

    def code_bytes(self, numel: int) -> int:
        return numel // 2

    def pack(self, codes: Tensor) -> Tensor:
        pairs = (codes + 8).to(torch.uint8).view(len(codes), -1, 2)
        return pairs[..., 0] | (pairs[..., 1] << 4)

    def unpack(self, data: Tensor, *, numel: int) -> Tensor:
        pairs = torch.stack([data & 15, data >> 4], dim=-1)
        return pairs.view(len(data), numel).float() - 8


class Sign(Scaled):
    """One bit a value, and a block's mean magnitude (1-bit SGD, Seide et al. 2014)."""

    def code_bytes(self, numel: int) -> int:
        return numel // 8

    def scales(self, blocks: Tensor) -> Tensor:
        mean = blocks.abs().mean(dim=-1)
        return torch.where(torch.isfinite(mean), mean, torch.nan)

    def rounded(self, codes: Tensor, *, key: int) -> Tensor:
        return codes.sign_()

    def pack(self, codes: Tensor) -> Tensor:
        bits = (codes >= 0).view(len(codes), -1, 8).to(torch.uint8)
        return (bits << self._places(bits)).sum(dim=-1, dtype=torch.uint8)

    def unpack(self, data: Tensor, *, numel: int) -> Tensor:
        bits = (data.unsqueeze(-1) >> self._places(data)) & 1
        return bits.view(len(data), numel).float() * 2 - 1

    @staticmethod
    def _places(beside: Tensor) -> Tensor:
        return torch.arange(8, dtype=torch.uint8, device=beside.device)
