"""Learning from preferences (DPO): of two answers to the same, the chosen one is to be likelier.

Loss of a pair (Rafailov et al., arXiv 2305.18290, equation 7; label smoothing from Mitchell,
https://ericmitchell.ai/cdpo.pdf; without a reference, per token and with a margin: SimPO, arXiv
2405.14734, equation 6), with m the difference of the two answers' log-likelihoods, less that of the
reference: -(1 - s) log sigmoid(beta m - margin) - s log sigmoid(margin - beta m).

A row holds both conversations as two documents, which do not see each other, so a pair is one pass.
The loss depends on each answer's likelihood alone, so its gradient is the cross entropy's of each
token, weighted: what is differentiated is that, chunk by chunk.
Shapes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.errors import DataError
from shoal.fields import IGNORED
from shoal.tasks.chat import Chat
from shoal.tasks.task import (
    Batch,
    Curve,
    Evaluated,
    Named,
    Output,
    Record,
    Sample,
    Scores,
    Task,
    Tools,
    Vector,
    Vocabulary,
    was,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal.models.anatomy import Anatomy

CHOSEN, REJECTED = 0, 1
"""Documents of a row."""


class Preference(Chat):
    """Two answers to the same prompt; the loss and its scores are per pair."""

    kind = "preference"
    runs_once = False  # a second time, for the reference
    packs = False
    target_name = "pairs"
    curve = Curve("nats per pair", baseline="even_loss", baseline_name="no preference")

    def __init__(
        self, settings: Mapping[str, Any] | None = None, *, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(settings, options=options)
        self._trained = "last"  # earlier answers are the same in both

    def examined(self) -> Task:
        """transformers has no loss of pairs; the model and its documents are those of a chat."""
        return Chat(self.settings)

    def encode(self, records: Sequence[Record], *, tools: Tools) -> list[Sample]:
        """`chosen` and `rejected` -> one row of two documents, each with its answer for labels.

        A pair that is longer than the row loses the ends of its answers, each of them beyond half
        of the row or what the other leaves. Raises DataError, with the line.
        """
        pairs = [
            [{**record, "messages": record[which]} for which in ("chosen", "rejected")]
            for record in records
            if _is_pair(record)
        ]
        flat = super().encode([each for pair in pairs for each in pair], tools=tools)
        return [
            _row(chosen, rejected, most=tools.sequence_tokens, record=pair[0])
            for chosen, rejected, pair in zip(flat[::2], flat[1::2], pairs)
        ]

    def count(self, batch: Batch) -> int:
        """Pairs of a batch."""
        return int((batch["labels"] != IGNORED).any(1).sum())

    def output(self, model: nn.Module, anatomy: Anatomy, batch: Batch, *, step: int = 0) -> Output:
        """Hidden states [B, T, D], and what the reference gives each answer [B, 2]."""
        import torch

        from shoal.models.adapter import switched_off
        from shoal.models.anatomy import head_parameters, hidden_of, logits_of

        answers = Answers(logits_of(model), head_parameters(model))
        reference = None
        if self.options.get("reference", "adapter-off") == "adapter-off":
            was_training = model.training
            model.eval()
            with torch.no_grad(), switched_off(model):
                reference = hidden_of(model, dict(batch), step=step)
            model.train(was_training)
        return Output(
            hidden=hidden_of(model, dict(batch), step=step),
            fields={"labels": batch["labels"], "document_ids": batch["document_ids"]},
            loss=PairLoss(answers, reference, Weighing.of(self.options)),
        )

    def metrics(self) -> PairMetrics:
        """A fresh accumulator."""
        return PairMetrics()

    def baseline(self, data: Evaluated) -> Named:
        """`even_loss`: of no preference at all; `longer_wins`: how often the longer is chosen."""
        longer, count = 0.0, 0
        for row in data.rows():
            targets = row["labels"] != IGNORED
            lengths = [int((targets & (row["document_ids"] == d)).sum()) for d in (0, 1)]
            longer += float(np.sign(lengths[0] - lengths[1]) + 1) / 2
            count += 1
        return {"even_loss": math.log(2), "longer_wins": longer / max(count, 1)}

    def words(self, before: Named | None, after: Named) -> list[str]:
        """How often the chosen answer is the likelier one, and by how much."""
        return [
            f"chosen answers preferred: {was(before, 'accuracy', 3)}{after['accuracy']:.3f} of "
            f"pairs now; by taking the longer one {after['longer_wins']:.3f}",
            f"loss: {was(before, 'evaluation_loss', 3)}{after['evaluation_loss']:.3f} nats per "
            f"pair now; no preference {after['even_loss']:.3f}",
        ]


def _is_pair(record: Record) -> bool:
    if "rejected" in record:
        return True
    raise DataError(
        f"preference: expected two answers to each prompt, got keys {sorted(record)}\n"
        "    a line has `chosen` and `rejected`, and `prompt` where they do not begin with it"
    )


def _row(chosen: Sample, rejected: Sample, *, most: int | None, record: Record) -> Sample:
    """Both as documents of one row of at most `most` tokens."""
    limits = [len(chosen["input_ids"]), len(rejected["input_ids"])]
    if most is not None and sum(limits) > most:
        short, half = min(limits), most // 2
        limits = [half, half] if short > half else [min(each, most - short) for each in limits]
    row: Sample = {"input_ids": [], "labels": [], "position_ids": [], "document_ids": []}
    for number, (sample, limit) in enumerate(zip((chosen, rejected), limits)):
        labels = list(sample["labels"][:limit])
        if limit < len(sample["labels"]):
            labels[-1] = IGNORED  # what it is followed by is not in the row
        if all(label == IGNORED for label in labels):
            raise DataError(
                f"{record['where']}: nothing of an answer is within {limit} tokens\n"
                "    set data.sequence_tokens higher, or remove the line"
            )
        row["input_ids"] += list(sample["input_ids"][:limit])
        row["labels"] += labels
        row["position_ids"] += range(limit)
        row["document_ids"] += [number] * limit
    return row


@dataclass(frozen=True)
class Weighing:
    """How two likelihoods become a loss."""

    beta: float
    margin: float
    smoothing: float
    per_token: bool
    sft: float

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Weighing:
        """By the recipe's section."""
        return cls(
            options.get("beta", 0.1),
            options.get("margin", 0.0),
            options.get("label_smoothing", 0.0),
            options.get("length_normalised", False),
            options.get("sft_weight", 0.0),
        )


@dataclass(frozen=True)
class Answers:
    """What gives answers their likelihood: the head."""

    logits_of: Any
    head: Sequence[nn.Parameter]

    def losses(self, hidden: Tensor, labels: Tensor, vocabulary: Vocabulary | None) -> Tensor:
        """Cross entropy of each token [B, T], 0 where there is no target; no gradients."""
        from shoal.tasks.losses import chunked_losses

        return chunked_losses(
            hidden,
            labels,
            self.logits_of,
            head_parameters=self.head,
            vocabulary=vocabulary,
        ).losses


@dataclass(frozen=True)
class PairLoss:
    """The loss of pairs, from the cross entropies of their tokens."""

    answers: Answers
    reference: Tensor | None
    weighing: Weighing

    def total(self, output: Output, *, vocabulary: Vocabulary | None, scale: float) -> Tensor:
        """The SUM over pairs: its value, with the gradient of weighted cross entropies."""
        import torch

        from shoal.tasks.losses import chunked_loss

        labels = output.fields["labels"]
        with torch.no_grad():
            losses, slopes, _ = self._pairs(output, vocabulary)
        weighted = chunked_loss(
            output.hidden,
            labels,
            self.answers.logits_of,
            head_parameters=self.answers.head,
            vocabulary=vocabulary,
            expected_scale=scale,
            weights=slopes,
        )
        return weighted + (losses.sum() - weighted.detach())

    def each(self, output: Output, *, vocabulary: Vocabulary | None, predict: bool) -> Scores:
        """The loss of each pair [B], and whether the chosen answer is the likelier one."""
        import torch

        with torch.no_grad():
            losses, _, margins = self._pairs(output, vocabulary)
        return Scores(losses, (margins > 0).long() if predict else None)

    def _pairs(
        self, output: Output, vocabulary: Vocabulary | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of each pair its loss [B], the derivative by each token's cross entropy [B, T], m [B]."""
        import torch
        from torch.nn.functional import logsigmoid

        how = self.weighing
        margins, share, own = self._margins(output, vocabulary)
        real = share.any(dim=1).any(dim=1)
        inside = how.beta * margins - how.margin
        losses = -(1 - how.smoothing) * logsigmoid(inside) - how.smoothing * logsigmoid(-inside)
        # d loss / d margin, then by the cross entropies: less is likelier
        slope = how.beta * (torch.sigmoid(inside) - 1 + how.smoothing)
        slopes = slope[:, None] * (share[:, REJECTED] - share[:, CHOSEN])
        if how.sft:
            weights = share[:, CHOSEN].bool().to(own.dtype)
            weights = how.sft * weights / weights.sum(1, keepdim=True).clamp(min=1)
            losses, slopes = losses + (own * weights).sum(1), slopes + weights
        return losses * real, slopes * real[:, None], margins

    def _margins(
        self, output: Output, vocabulary: Vocabulary | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """m of each pair [B]; each token's share in its answer's [B, 2, T]; cross entropies."""
        import torch

        labels = output.fields["labels"]
        own = self.answers.losses(output.hidden, labels, vocabulary)
        documents = output.fields["document_ids"]
        which = torch.stack([documents == CHOSEN, documents == REJECTED], dim=1)
        share = (which & (labels != IGNORED)[:, None]).to(own.dtype)
        if self.weighing.per_token:
            share = share / share.sum(2, keepdim=True).clamp(min=1)
        likelihoods = -own
        if self.reference is not None:
            likelihoods = likelihoods + self.answers.losses(self.reference, labels, vocabulary)
        of_answers = (share * likelihoods[:, None]).sum(2)
        return of_answers[:, CHOSEN] - of_answers[:, REJECTED], share, own


class PairMetrics:
    """Sums over pairs: [loss, preferred rightly, pairs]."""

    needs_predictions = True

    def __init__(self) -> None:
        self._sums = np.zeros(3)

    def add(self, *, batch: Batch, scores: Scores) -> None:
        """Count losses and predictions [B]; rows without a target only fill the batch."""
        assert scores.predictions is not None, "pairs are scored by what is preferred"
        real = (np.asarray(batch["labels"]) != IGNORED).any(axis=1)
        losses = np.asarray(scores.losses.double())[real]
        right = np.asarray(scores.predictions)[real]
        self._sums += [float(losses.sum()), float(right.sum()), float(real.sum())]

    def vector(self) -> Vector:
        """[loss, preferred rightly, pairs]."""
        return self._sums.copy()

    def result(self, vector: Vector | None = None) -> Named:
        """Mean loss in nats per pair, and how often the chosen answer is the likelier one."""
        loss, right, pairs = (float(each) for each in (self._sums if vector is None else vector))
        if not pairs:
            return {"evaluation_loss": math.nan, "accuracy": math.nan, "evaluation_targets": 0.0}
        return {
            "evaluation_loss": loss / pairs,
            "accuracy": right / pairs,
            "evaluation_targets": pairs,
        }
