"""What all exact products share: rows in pieces, and the probe that compares rows of batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_ROWS = 512
"""Rows of one product; more are computed in pieces, so that no other kernel is ever chosen."""


@dataclass(frozen=True)
class Way:
    """How products with one shape of weight are computed; rows are padded to a `multiple`."""

    packed: bool
    multiple: int
    proven: bool = True
    """Whether the probe saw no bit differ."""
    pieces: int = 1
    """Parts of the inputs whose products are added in order."""


def in_pieces(rows: Tensor, product: Callable[[Tensor], Tensor], *, outputs: int) -> Tensor:
    """`product` of rows [..., I], at most `MOST_ROWS` at once: [..., outputs]."""
    flat = rows.reshape(-1, rows.shape[-1])
    if not len(flat):  # an expert that nobody chose
        return flat.new_empty(*rows.shape[:-1], outputs)
    if len(flat) <= MOST_ROWS:
        made = product(flat)
    else:
        made = torch.cat([product(part) for part in flat.split(MOST_ROWS)])
    return made.view(*rows.shape[:-1], made.shape[-1])


def probe_rows(inputs: int, *, count: int, like: Tensor) -> Tensor:
    """Rows [count, inputs] that a product is probed with, where `like` is and in its format."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(MOST_ROWS, inputs, generator=generator)[:count].to(like)


def keeps_rows(product: Callable[[Tensor], Tensor], rows: Tensor, counts: tuple[int, ...]) -> bool:
    """Whether `product` gives rows the same bits among all of `rows` and among `counts` of them.

    At two places each, and with one thread as with as many as this process has.
    """
    threads = torch.get_num_threads()
    whole = product(rows)
    try:
        torch.set_num_threads(1)
        if threads > 1 and not torch.equal(product(rows), whole):
            return False
    finally:
        torch.set_num_threads(threads)
    return all(
        torch.equal(product(rows[start : start + count]), whole[start : start + count])
        for count in counts
        for start in {0, (len(rows) - count) // 2 | 1}
        if start + count <= len(rows)
    )
