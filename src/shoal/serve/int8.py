"""Products of whole numbers of 8 bits: weights by output, rows by their own largest.

A sum of whole numbers has no rounding, so a row's bits depend on no other row whatever kernel
computes them, and a weight is a quarter of its float32 size to read.

Shapes: R rows, I inputs, O outputs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from shoal.serve.rows import MOST_ROWS, Way, in_pieces, keeps_rows, probe_rows

_MIDDLE = 128
"""What is added to a row's codes: the kernel's left side has no sign."""
_LARGEST = 127
_LEAST_SCALE = 1e-30
"""Of a row that has nothing but zeros."""


def cannot_multiply(device: torch.device | None = None) -> str | None:
    """Why products of 8 bits are not to be had on `device` (the CPU); None: they are."""
    if device is not None and device.type != "cpu":
        return f"its products are oneDNN's, which are for CPUs, and this is {device.type}"
    return _cannot_multiply()


@cache
def _cannot_multiply() -> str | None:
    """Without VNNI oneDNN adds pairs of products in 16 bits, which overflow in silence."""
    if not hasattr(torch.ops.onednn, "qlinear_prepack") or not torch.backends.mkldnn.is_available():
        return "this build of torch has not oneDNN's products of 8 bits"
    ones = torch.ones(1, 64)
    for weight in (ones, -ones):
        found = float(Int8Product(weight, None)(ones))
        if abs(abs(found) - 64.0) > 1e-3:
            return (
                "products of 8 bits overflow on this processor, which has no VNNI: the sum of 64 "
                f"ones came to {abs(found):.3g}"
            )
    return None


class Int8Product(nn.Module):
    """What stands in for a linear layer's forward: rows [..., I] -> [..., O], both float32.

    A weight's scale is its row's largest magnitude / 127, and so is that of a row of the input
    (dynamic quantisation by token and channel, LLM.int8, arXiv 2208.07339, without its outliers).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.way = Way(packed=True, multiple=1)
        self._bias, self._outputs = bias, len(weight)
        scales = weight.abs().amax(dim=1).clamp(min=_LEAST_SCALE) / _LARGEST
        codes = (weight / scales[:, None]).round().to(torch.int8)
        # private in torch 2.13: the product that Inductor uses for quantised weights
        self._codes = torch.ops.onednn.qlinear_prepack(codes, None)
        self._scales = scales.contiguous()
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)

    def forward(self, rows: Tensor) -> Tensor:
        """Each row's product, the same bits whatever the other rows are."""
        return in_pieces(rows, self._piece, outputs=self._outputs)

    def _piece(self, rows: Tensor) -> Tensor:
        scales = rows.abs().amax(dim=1, keepdim=True).clamp_(min=_LEAST_SCALE).div_(_LARGEST)
        codes = torch.div(rows, scales).round_().add_(_MIDDLE).to(torch.uint8)
        made: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes,
            1.0,
            _MIDDLE,
            self._codes,
            self._scales,
            self._zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        made.mul_(scales)
        return made if self._bias is None else made.add_(self._bias)


@torch.no_grad()
def is_exact(product: Int8Product, *, inputs: int) -> bool:
    """Whether no bit of a row was seen to depend on others here, with one thread or several."""
    rows = probe_rows(inputs, count=MOST_ROWS, like=torch.empty(0))
    return keeps_rows(product, rows, (1, 2, 3, 5, 8, 16, 33, 64))
