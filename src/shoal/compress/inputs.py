"""Inputs of layers as whole numbers of 8 bits, each token with a scale of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

_LEAST, _MOST = -128, 127


def by_token(rows: Tensor) -> Tensor:
    """[..., I] at the nearest points of each row's grid, as compressed-tensors has it.

    The scale is the row's largest size over 127.5 (calculate_qparams, symmetric), so that both
    -128 and 127 are codes.
    """
    largest = rows.abs().amax(dim=-1, keepdim=True)
    scale = largest / ((_MOST - _LEAST) / 2)
    scale = torch.where(scale == 0, torch.finfo(rows.dtype).eps, scale)
    return (rows / scale).round().clamp(_LEAST, _MOST) * scale


@contextlib.contextmanager
def rounded_inputs(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """While it is open, these layers of `model` get rounded inputs."""

    def hook(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (by_token(given[0]), *given[1:])

    handles = [model.get_submodule(path).register_forward_pre_hook(hook) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
