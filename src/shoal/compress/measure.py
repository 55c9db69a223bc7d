"""What compression cost: two models on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn


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


@torch.no_grad()
def difference(before: nn.Module, after: nn.Module, batches: Sequence[Tensor]) -> Difference:
    """`batches`: token ids [n, T] without padding; every sample counts."""
    losses: list[tuple[float, float]] = []
    divergence, same, tokens = 0.0, 0, 0
    for ids in batches:
        for row in ids:
            ours, theirs = (
                functional.log_softmax(
                    model(input_ids=row[None], use_cache=False).logits[0, :-1].float(), dim=-1
                )
                for model in (before, after)
            )
            target = row[1:, None]
            losses.append(
                tuple(-each.gather(1, target).double().mean().item() for each in (ours, theirs))  # type: ignore[arg-type]
            )
            kl = functional.kl_div(theirs, ours, log_target=True, reduction="none")
            divergence += float(kl.double().sum())
            same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            tokens += len(target)
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
