"""Context parallelism: every rank has a part of each row (parallel/rows.py).

Every rank has all parameters and the gradients of its tokens, so that all gradients are partial
over context; with the shard axis, its reductions sum over both (parallel/shard.py).
"""

from __future__ import annotations

from torch import nn

from shoal.legal.rules import CONTEXT_KINDS
from shoal.models.anatomy import Anatomy
from shoal.parallel.exchange import Exchange
from shoal.parallel.local import Holdings, sharded_of
from shoal.parallel.mesh import Mesh
from shoal.parallel.rows import Context
from shoal.parallel.settings import Settings


def apply_context(
    model: nn.Module, anatomy: Anatomy, mesh: Mesh, holdings: Holdings, settings: Settings
) -> Holdings:
    """Let forwards of `model` see a part of each row; without the context axis nothing happens.

    Raises ValueError for a kind that is none.
    """
    if settings.context_kind not in CONTEXT_KINDS:
        kinds = ", ".join(CONTEXT_KINDS)
        raise ValueError(f"kind: expected one of {kinds}; got {settings.context_kind!r}")
    group = mesh.group("context")
    if group is None:
        return holdings
    exchange = Exchange(group, rank=mesh.coordinate("context"), size=mesh.degree("context"))
    sharded_of(model).context = Context(exchange, settings.context_kind, mesh.degree("tensor"))
    over = frozenset({"context"})
    return holdings.changed(
        {n: {"copies": e.copies | over, "partial": e.partial | over} for n, e in holdings.items()}
    )
