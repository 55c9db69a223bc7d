"""What travels beside the tokens of one forward: their documents, and their places for dropout.

Worker threads of one process run forwards at the same time, so the current passage is kept per
thread. It is read where a family does not hand its keyword arguments on: by the mask interface
(once per forward) and by keyed dropout. Recompute may run in another thread or after another micro
batch; `checkpoint_contexts` carries the passage of the forward into it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROW_STRIDE = 1 << 24
"""Distance between the token indices of two samples: longer than any row."""


@dataclass(frozen=True)
class Passage:
    """One forward's tokens: `document_ids` int [B, T] (-1 = padding), and what keys its dropout.

    `token_indices` int64 [B, T] are global: sample index x ROW_STRIDE + place in the row, so that
    they depend neither on how the batch was cut nor on how far its rows were trimmed.
    """

    document_ids: Tensor | None = None
    token_indices: Tensor | None = None
    step: int = 0


_EMPTY = Passage()
_thread = threading.local()


def current() -> Passage:
    """The passage of the forward that this thread is in (an empty one outside any)."""
    passage: Passage = getattr(_thread, "passage", _EMPTY)
    return passage


@contextlib.contextmanager
def passing(passage: Passage) -> Iterator[None]:
    """Run a forward of `passage` in this thread."""
    before = current()
    _thread.passage = passage
    try:
        yield
    finally:
        _thread.passage = before


def passage_of(batch: dict[str, Tensor], *, step: int = 0) -> Passage:
    """The passage of a batch (DESIGN 4: document_ids [B, T], sample_ids [B], both optional)."""
    indices = batch.get("token_indices")
    samples = batch.get("sample_ids")
    if indices is None and samples is not None and "input_ids" in batch:
        places = torch.arange(batch["input_ids"].shape[1], device=samples.device)
        indices = samples[:, None] * ROW_STRIDE + places
    return Passage(document_ids=batch.get("document_ids"), token_indices=indices, step=step)


def checkpoint_contexts() -> tuple[
    contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]
]:
    """`context_fn` for `torch.utils.checkpoint`: the recompute sees the passage of its forward."""
    return contextlib.nullcontext(), passing(current())
