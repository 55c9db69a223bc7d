"""Distillation: a smaller language model learns the next-token probabilities of a larger one.

Loss of a token (Hinton et al., arXiv 1503.02531, section 2.1), with z and v the logits of student
and teacher, w the teacher's share and t the temperature:
(1 - w) cross entropy(z, token) + w t^2 KL(softmax(v / t) || softmax(z / t)).

The teacher is a frozen model, whole on every worker. Evaluations score the cross entropy alone, so
that they compare with any language model's. Shapes: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.fields import IGNORED
from shoal.tasks.causal_lm import CausalLM
from shoal.tasks.task import Batch, Evaluated, Named, Output, Scores, Vocabulary

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal.models.anatomy import Anatomy


class Distillation(CausalLM):
    """Next-token prediction by the tokens and by the teacher's probabilities for them."""

    kind = "distillation"
    whole_logits = True
    token_losses = True

    @property
    def companion_path(self) -> str | None:
        """The teacher's folder, hub id or registry name."""
        return self.options.get("teacher")

    def output(self, model: nn.Module, anatomy: Anatomy, batch: Batch, *, step: int = 0) -> Output:
        """Hidden states [B, T, D] of the student, and in training those of the teacher."""
        import torch

        from shoal.models.anatomy import head_parameters, hidden_of, logits_of
        from shoal.tasks.losses import TokenCrossEntropy

        fields = {"labels": batch["labels"]}
        hidden = hidden_of(model, dict(batch), step=step)
        plain = TokenCrossEntropy(logits_of(model), head_parameters(model))
        if self.companion is None or not model.training:
            return Output(hidden, fields, plain)
        with torch.no_grad():
            fields["teacher"] = hidden_of(self.companion, dict(batch))
        loss = TaughtLoss(
            plain,
            logits_of(model),
            logits_of(self.companion),
            share=self.options.get("teacher_weight", 0.5),
            temperature=self.options.get("temperature", 2.0),
        )
        return Output(hidden, fields, loss)

    def baseline(self, data: Evaluated) -> Named:
        """The unigram's, and `teacher_loss`: the teacher's own cross entropy on the same."""
        found = super().baseline(data)
        if self.companion is None:
            return found
        import torch

        device = next(self.companion.parameters()).device
        total, targets = 0.0, 0
        with torch.no_grad():
            for row in data.rows():
                batch = {n: torch.as_tensor(each)[None].to(device) for n, each in row.items()}
                scores = super().output(self.companion, None, batch).each()  # type: ignore[arg-type]
                total += float(scores.losses.double().sum())
                targets += int((np.asarray(row["labels"]) != IGNORED).sum())
        return {**found, "teacher_loss": total / max(targets, 1)}

    def words(self, before: Named | None, after: Named) -> list[str]:
        """As of any language model, and the teacher's loss beside."""
        teacher = after.get("teacher_loss")
        said = [] if teacher is None else [f"the teacher's loss on the same: {teacher:.3f} nats"]
        return [*super().words(before, after), *said]


@dataclass(frozen=True)
class TaughtLoss:
    """The sum over targets of both terms; the field `teacher` has the teacher's hidden states."""

    plain: Any
    student: Callable[[Tensor], Tensor]
    teacher: Callable[[Tensor], Tensor]
    share: float
    temperature: float

    def total(self, output: Output, *, vocabulary: Vocabulary | None, scale: float) -> Tensor:
        """The SUM over targets, chunk by chunk. Raises ValueError for a head that was cut."""
        import torch
        from torch.utils.checkpoint import checkpoint

        if vocabulary is not None:
            raise ValueError("distillation reads whole logits\n    set parallel.tensor to 1")
        labels = output.fields["labels"].reshape(-1)
        rows = torch.nonzero(labels != IGNORED)[:, 0]
        hidden, taught = (
            each.reshape(-1, each.shape[-1]) for each in (output.hidden, output.fields["teacher"])
        )
        total = hidden.sum() * 0.0  # a graph, also where no token is a target
        for part in rows.split(self._chunk(taught)):
            total = total + checkpoint(
                self._part, hidden[part], taught[part], labels[part], use_reentrant=False
            )
        return total

    def each(self, output: Output, *, vocabulary: Vocabulary | None, predict: bool) -> Scores:
        """The cross entropy of each target."""
        found: Scores = self.plain.each(output, vocabulary=vocabulary, predict=predict)
        return found

    def _chunk(self, taught: Tensor) -> int:
        from shoal.tasks.losses import chunk_tokens_for

        classes = self.teacher(taught[:1]).shape[-1]
        return chunk_tokens_for(classes, device=taught.device.type)

    def _part(self, hidden: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        """Of one chunk [N, D]."""
        import torch
        from torch.nn.functional import cross_entropy, kl_div

        own = self.student(hidden)
        own = own if own.dtype == torch.float64 else own.float()
        with torch.no_grad():
            theirs = self.teacher(taught).to(own.dtype)[:, : own.shape[-1]]
        heat = self.temperature
        apart = kl_div(
            (own / heat).log_softmax(-1),
            (theirs / heat).log_softmax(-1),
            reduction="sum",
            log_target=True,
        )
        told = cross_entropy(own, labels, reduction="sum")
        return (1 - self.share) * told + self.share * heat**2 * apart
