"""What a task hands to the loss, and how its scores add up over batches and ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal.models.anatomy import Anatomy

Record = dict[str, Any]
Sample = dict[str, list[int]]
Vector = NDArray[np.float64]

IGNORED = -100
"""The label of a position without a target."""


@dataclass(frozen=True)
class TaskOutput:
    """Hidden states [..., D], targets [...] (-100 = none), and what makes logits of the states."""

    hidden: Tensor
    labels: Tensor
    logits_of: Callable[[Tensor], Tensor]
    head_parameters: list[nn.Parameter]


class Metrics(Protocol):
    """Scores of evaluation batches as one vector of sums, so that ranks add theirs up."""

    needs_predictions: bool

    def add(self, *, batch: dict[str, Tensor], losses: Tensor, predictions: Tensor | None) -> None:
        """Count one batch; rows whose sample id is negative only fill it and do not count."""

    def vector(self) -> Vector:
        """Everything counted so far; vectors of ranks are summed elementwise."""

    def result(self, vector: Vector | None = None) -> dict[str, float]:
        """Named scores of a (summed) vector; of this accumulator's own when None."""


class Task(Protocol):
    """One objective: how records become samples, and a batch becomes hidden states and targets."""

    kind: str
    auto_class: str
    packable: bool

    def settings(self, records: list[Record]) -> dict[str, Any]:
        """What the task learns from the data once; JSON-able; `create` takes it back."""

    def model_settings(self) -> dict[str, Any]:
        """Keys that the model's configuration gets from the task."""

    def encode(self, records: list[Record], *, tokenizer: Any) -> list[Sample]:
        """Records as token ids (and labels, where the task has its own)."""

    def forward(
        self, model: nn.Module, anatomy: Anatomy, batch: dict[str, Tensor], *, step: int = 0
    ) -> TaskOutput:
        """Hidden states and targets of a batch. `step` keys the dropout."""

    def metrics(self) -> Metrics:
        """A fresh accumulator for one evaluation."""


def output_of(model: nn.Module, *, batch: dict[str, Tensor], step: int) -> TaskOutput:
    """Hidden states [B, T, D] of the base model, the batch's labels [B, T], and the head."""
    from shoal.models.anatomy import head_parameters, hidden_of, logits_of

    return TaskOutput(
        hidden=hidden_of(model, batch, step=step),
        labels=batch["labels"],
        logits_of=logits_of(model),
        head_parameters=head_parameters(model),
    )


def counted_rows(batch: dict[str, Tensor]) -> Tensor | None:
    """Which rows of a batch count (bool [B]); None when all do."""
    samples = batch.get("sample_ids")
    return None if samples is None else samples >= 0
