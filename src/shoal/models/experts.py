"""Mixtures of experts: rows sorted by expert, then one product of each expert with its own rows.

Registered with transformers as `shoal`, beside its `eager` and `grouped_mm`, and run by each family
whose experts are one module with three-dimensional weights. Unlike those it has a gradient of one
order of summation whatever the number of threads, runs in float64 and under autocast, and has a
place where rows may go to the ranks that have their experts (parallel/expert.py).

Shapes: N tokens, K experts of each, E experts, D hidden size, F inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

NAME = "shoal"
"""The implementation that models are built with."""
CORRECTION = "e_score_correction_bias"
"""Of DeepSeek-V3's router and its relatives: added to scores where experts are chosen."""

Products = Callable[[Tensor, Tensor], Tensor]
"""Rows [R, D] sorted by expert, how many each has -> what the experts make of them [R, D]."""


class Dispatch(Protocol):
    """Where the experts of a module are."""

    def __call__(self, rows: Tensor, counts: Tensor, products: Products) -> Tensor:
        """Rows [R, D] sorted by expert, of which `counts` [E] -> what is made of each [R, D]."""


def register() -> None:
    """Make `shoal` known to transformers; more than once changes nothing."""
    ExpertsInterface.register(NAME, run)


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold the experts of one block each, by path."""
    marks = ("num_experts", "down_proj", "is_transposed", "has_gate")
    return {
        path: module
        for path, module in model.named_modules()
        if all(hasattr(module, mark) for mark in marks)
    }


def keep_corrections(model: nn.Module) -> None:
    """Make the routers' corrections, which transformers keeps as buffers, frozen parameters.

    They belong to the weights of a model, so they are read, cut, saved and exported as those are.
    Training leaves them as they are: transformers has nothing that changes them either.
    """
    for module in model.modules():
        buffer = module._buffers.get(CORRECTION)
        if buffer is not None:
            del module._buffers[CORRECTION]
            module.register_parameter(CORRECTION, nn.Parameter(buffer, requires_grad=False))


@torch.compiler.disable  # how many rows an expert gets is known when it runs
def run(module: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Tokens [N, D] through the experts `indices` [N, K], summed with `weights` [N, K]: [N, D].

    A token's K products are added in the order in which the router names the experts.
    """
    num_chosen = indices.shape[-1]
    chosen = indices.reshape(-1)
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=module.num_experts)
    rows = take(hidden.to(compute_dtype(hidden)), order, copies=num_chosen)
    dispatch: Dispatch | None = getattr(module, "shoal_dispatch", None)

    def products(sorted_rows: Tensor, own: Tensor) -> Tensor:
        return _products(module, sorted_rows, own)

    load = getattr(module, "shoal_load", None)
    if load is not None:
        load.chosen += len(rows)
    made = products(rows, counts) if dispatch is None else dispatch(rows, counts, products)
    made = take(made, inverse(order)).view(-1, num_chosen, hidden.shape[-1])
    return (made * weights[..., None]).sum(dim=1).to(hidden.dtype)


def compute_dtype(like: Tensor) -> torch.dtype:
    """What matrix products of `like` are computed in, under autocast or not."""
    kind = like.device.type
    if torch.is_autocast_enabled(kind) and like.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return like.dtype


def take(rows: Tensor, order: Tensor, *, copies: int = 1) -> Tensor:
    """Rows [N, D], each standing for `copies`, in another order [N x copies]; each is taken once.

    The gradient of a row is the sum of its copies', in one order.
    """
    taken: Tensor = _Taken.apply(rows, order, copies)  # type: ignore[no-untyped-call]
    return taken


def inverse(order: Tensor) -> Tensor:
    """The order that undoes a permutation."""
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return back


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.copies = copies
        return rows.index_select(0, order if copies == 1 else order // copies)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (order,) = ctx.saved_tensors
        back = gradient.index_select(0, inverse(order))
        if ctx.copies > 1:
            back = back.view(-1, ctx.copies, *gradient.shape[1:]).sum(dim=1)
        return back, None, None


def _products(module: Any, rows: Tensor, counts: Tensor) -> Tensor:
    """What each expert makes of its rows [R, D]: two layers, as the module of transformers has."""
    load = getattr(module, "shoal_load", None)
    if load is not None:
        load.computed += len(rows)
    layers = "gate_up_proj" if module.has_gate else "up_proj", "down_proj"
    inner = _product(module, layers[0], rows, counts)
    # private in transformers 5.23: how a family joins its gate and what it gates
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    made = _product(module, layers[1], inner, counts)
    return module.post_expert_norm(made) if module.has_post_expert_norm else made


def _product(module: Any, layer: str, rows: Tensor, counts: Tensor) -> Tensor:
    """Rows [R, in], sorted by expert, with each expert's own weight: [R, out]."""
    stacked: Tensor = getattr(module, layer)
    if module.is_transposed:
        stacked = stacked.transpose(1, 2)
    if not module.has_bias and groups_products(rows, stacked):
        return grouped(rows, stacked, counts)
    biases = (
        getattr(module, f"{layer}_bias").unbind(0) if module.has_bias else [None] * len(stacked)
    )
    # an expert without rows takes part: its gradient is zero, not absent
    parts = zip(rows.split(counts.tolist()), stacked.unbind(0), biases, strict=True)
    linear = getattr(module, "shoal_linear", functional.linear)  # serve/exact.py has another
    return torch.cat([linear(own, weight, bias) for own, weight, bias in parts])


def groups_products(rows: Tensor, stacked: Tensor) -> bool:
    """Whether torch has one kernel for all experts: a GPU's, of bfloat16 in steps of 16 bytes."""
    return (
        rows.is_cuda
        and rows.dtype == torch.bfloat16
        and hasattr(functional, "grouped_mm")
        and torch.cuda.get_device_capability(rows.device) >= (8, 0)
        and stacked.shape[1] % 8 == stacked.shape[2] % 8 == 0
    )


def grouped(rows: Tensor, stacked: Tensor, counts: Tensor) -> Tensor:
    """`_product` by that kernel: rows [R, in], weights [E, out, in]; nothing waits for counts."""
    ends = counts.cumsum(0).to(torch.int32)
    weights = stacked.to(rows.dtype).transpose(1, 2)
    made: Tensor = functional.grouped_mm(rows, weights, offs=ends)
    return made
