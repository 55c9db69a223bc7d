"""What travels beside the tokens of one forward: their documents and positions, and the kernel.

Worker threads of one process run forwards at the same time, so the current context is kept per
thread. It is read where a family does not hand its keyword arguments on: by attention (the mask
once per forward, the kernel in every layer) and by keyed dropout. Recompute may run in another
thread or after another micro batch; `checkpoint_contexts` carries the forward's context into it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from shoal.models.kernels import Kernel, local

ROW_STRIDE = 1 << 24
"""Distance between the token indices of two samples: longer than any row."""


@dataclass
class Routing:
    """What routers decide in one forward, block by block. `rows`: B; `wants_sums`: `sums` too.

    Shapes: B rows, T tokens, E experts, K experts of a token.
    """

    rows: int
    wants_sums: bool = False
    counts: dict[int, Tensor] = field(default_factory=dict)
    """Of each block [B, E], by its number: tokens that each expert gets, padding left out."""
    sums: dict[int, Tensor] = field(default_factory=dict)
    """Of each block [B, E]: the router's probabilities summed over tokens."""
    tokens: Tensor | None = None
    """Tokens of each row that are no padding [B]."""

    def again(self) -> Routing:
        """One that takes the same decisions when they are made again, and is thrown away."""
        return Routing(self.rows, self.wants_sums)

    def add(self, number: int, logits: Tensor, indices: Tensor, documents: Tensor | None) -> None:
        """A block's router: logits [B x T, E], experts [B x T, K]; `documents` [B, T]."""
        experts, shape = logits.shape[-1], (self.rows, -1)
        real = torch.ones(len(logits), device=logits.device)
        real = (real if documents is None else (documents >= 0).flatten()).float().view(shape)
        weights = real[..., None].expand(-1, -1, indices.shape[-1]).reshape(shape)
        counts = torch.zeros(self.rows, experts, device=logits.device)
        self.counts[number] = counts.scatter_add_(1, indices.view(shape), weights)
        self.tokens = real.sum(1)
        if self.wants_sums:
            probabilities = logits.softmax(dim=-1).float().view(self.rows, -1, experts)
            self.sums[number] = (probabilities * real[..., None]).sum(1)


@dataclass(frozen=True)
class ForwardContext:
    """One forward's tokens, as far as this rank has them, and how they attend to one another.

    `document_ids` int [B, T], -1 = padding. `token_indices` int64 [B, T] key the dropout; they are
    global: sample index x ROW_STRIDE + position in the row, so that they depend neither on how the
    batch was cut nor on how far its rows were trimmed. Neighbours in a row need not be neighbours
    in the sample: a rank may have several slices of it. `step`: the optimizer step.
    `row_document_ids`: of whole rows, where this rank has a part of each.
    """

    document_ids: Tensor | None = None
    token_indices: Tensor | None = None
    step: int = 0
    kernel: Kernel = local
    row_document_ids: Tensor | None = None
    routing: Routing | None = None
    """Where routers of experts tell what they decide."""


_OUTSIDE = ForwardContext()
_thread = threading.local()


def get_forward_context() -> ForwardContext:
    """The context of the forward that this thread is in (an empty one outside any)."""
    context: ForwardContext = getattr(_thread, "context", _OUTSIDE)
    return context


@contextlib.contextmanager
def set_forward_context(context: ForwardContext) -> Iterator[None]:
    """Run a forward with `context` in this thread."""
    before = get_forward_context()
    _thread.context = context
    try:
        yield
    finally:
        _thread.context = before


def forward_context_of(
    batch: Mapping[str, Tensor],
    *,
    step: int = 0,
    kernel: Kernel | None = None,
    routing: Routing | None = None,
) -> ForwardContext:
    """The context of a batch: its `document_ids` [B, T], `token_indices` [B, T], all optional.

    Where it has no indices its rows are whole from their first token on, of `sample_ids` [B].
    `kernel` None: that of the context around it.
    """
    return ForwardContext(
        batch.get("document_ids"),
        token_indices_of(batch),
        step,
        get_forward_context().kernel if kernel is None else kernel,
        batch.get("row_document_ids"),
        routing,
    )


def token_indices_of(batch: Mapping[str, Tensor]) -> Tensor | None:
    """The token indices of a batch int64 [B, T], where it has any or says what samples it has."""
    indices, samples = batch.get("token_indices"), batch.get("sample_ids")
    if indices is None and samples is not None and "input_ids" in batch:
        positions = torch.arange(batch["input_ids"].shape[1], device=samples.device)
        return samples[:, None] * ROW_STRIDE + positions
    return indices


def checkpoint_contexts() -> tuple[
    contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]
]:
    """`context_fn` for `torch.utils.checkpoint`: the recompute sees the context of its forward."""
    context = get_forward_context()
    if context.routing is not None:
        context = replace(context, routing=context.routing.again())
    return contextlib.nullcontext(), set_forward_context(context)
