"""What compression cost: two models on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from shoal.compress.workers import Workers


@dataclass(frozen=True)
class Difference:
    """Of a compressed model to the one it was, over the same tokens."""

    loss_before: float
    loss_after: float
    """Mean cross entropy of the next token, in nats."""
    loss_change: float
    standard_error: float
    """Of the change, paired over samples."""
    kl: float
    """Mean KL(before || after) of the next token's probabilities, in nats."""
    agreement: float
    """Share of tokens at which both have the same likeliest next one."""
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass
class _Sums:
    losses: list[tuple[float, float]] = field(default_factory=list)
    divergence: float = 0.0
    same: int = 0
    tokens: int = 0


def difference(
    before: nn.Module,
    after: nn.Module,
    batches: Sequence[Tensor],
    *,
    workers: Workers,
    say: Callable[[str, float], None] = lambda text, share: None,
) -> Difference:
    """`batches`: token ids [n, T] without padding; every sample counts. `workers` share them."""
    rows = [row for ids in batches for row in ids]
    sums = _Sums()

    def one(row: Tensor) -> _Sums:
        return _of_one(before, after, row)

    def take(found: _Sums) -> None:
        sums.losses += found.losses
        sums.divergence += found.divergence
        sums.same += found.same
        sums.tokens += found.tokens
        say("measuring", len(sums.losses) / len(rows))

    workers.ordered(one, rows, take)
    losses, divergence, same, tokens = sums.losses, sums.divergence, sums.same, sums.tokens
    pairs = torch.tensor(losses, dtype=torch.float64)
    changes = pairs[:, 1] - pairs[:, 0]
    error = changes.std() / len(changes) ** 0.5 if len(changes) > 1 else torch.zeros(())
    return Difference(
        loss_before=float(pairs[:, 0].mean()),
        loss_after=float(pairs[:, 1].mean()),
        loss_change=float(changes.mean()),
        standard_error=float(error),
        kl=divergence / tokens,
        agreement=same / tokens,
        tokens=tokens,
    )


def _of_one(before: nn.Module, after: nn.Module, row: Tensor) -> _Sums:
    """Of one sample [T]."""
    ours, theirs = (
        functional.log_softmax(
            model(input_ids=row[None], use_cache=False).logits[0, :-1].float(), dim=-1
        )
        for model in (before, after)
    )
    target = row[1:, None]
    each = [-part.gather(1, target).double().mean().item() for part in (ours, theirs)]
    kl = functional.kl_div(theirs, ours, log_target=True, reduction="none")
    return _Sums(
        [(each[0], each[1])],
        float(kl.double().sum()),
        int((ours.argmax(-1) == theirs.argmax(-1)).sum()),
        len(target),
    )
