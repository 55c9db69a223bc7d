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
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.models.kernels import Kernel, local

ROW_STRIDE = 1 << 24
"""Distance between the token indices of two samples: longer than any row."""


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
    batch: Mapping[str, Tensor], *, step: int = 0, kernel: Kernel | None = None
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
    return contextlib.nullcontext(), set_forward_context(get_forward_context())
