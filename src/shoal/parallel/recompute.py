"""Recompute of blocks in the backward instead of keeping what their forward made.

`full` keeps a block's input only (Chen et al., arXiv 1604.06174). `selective` keeps the results of
matrix products and of attention, which cost most to make again, and recomputes the rest
(arXiv 2205.05198).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from shoal.models.anatomy import Anatomy
from shoal.models.forward_context import checkpoint_contexts
from shoal.parallel.local import Holdings
from shoal.parallel.mesh import Mesh
from shoal.parallel.settings import Settings
from shoal.parallel.stages import own_blocks

KINDS = ("none", "selective", "full")

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    *([torch.ops.aten._grouped_mm.default] if hasattr(torch.ops.aten, "_grouped_mm") else []),
}


def apply_recompute(
    model: nn.Module, anatomy: Anatomy, mesh: Mesh, holdings: Holdings, settings: Settings
) -> Holdings:
    """Make every block recompute; `none` changes nothing. Raises ValueError for another kind."""
    kind = settings.recompute
    if kind not in KINDS:
        raise ValueError(f"recompute: expected one of {', '.join(KINDS)}; got {kind!r}")
    if kind == "none" or (settings.compile and kind == "selective"):
        return holdings
    contexts = checkpoint_contexts if kind == "full" else _selective
    for block in own_blocks(model, anatomy):
        block.forward = _recomputing(block.forward, contexts)
    return holdings


def _recomputing(run: Callable[..., Any], contexts: Callable[[], Any]) -> Callable[..., Any]:
    # nothing draws from the global random state: dropout is keyed by the forward context
    return functools.partial(
        checkpoint, run, use_reentrant=False, context_fn=contexts, preserve_rng_state=False
    )


class _OnlyKept(TorchDispatchMode):
    """Lets torch's mode see the operations that are kept alone.

    It counts every operation, and those of FSDP2's hooks within a block (experts are gathered by
    themselves) are others the second time: what is whole is not gathered again.
    """

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self._mode = mode

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function not in _KEPT:
            return function(*args, **(kwargs or {}))
        return self._mode.__torch_dispatch__(function, types, args, kwargs)


def _selective() -> tuple[Any, Any]:
    forward, backward = map(_OnlyKept, create_selective_checkpoint_contexts(_policy))
    ours_forward, ours_backward = checkpoint_contexts()
    return _both(forward, ours_forward), _both(backward, ours_backward)


def _policy(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    kept = operation in _KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@contextlib.contextmanager
def _both(first: Any, second: Any) -> Any:
    with first, second:
        yield
