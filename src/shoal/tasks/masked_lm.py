"""Predicting hidden tokens from both sides, as BERT is (Devlin et al., arXiv 1810.04805).

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shoal.errors import DataError
from shoal.fields import IGNORED
from shoal.splitmix import Words, mixed
from shoal.tasks.causal_lm import CausalLM, CausalLMMetrics, classify_tokens
from shoal.tasks.task import (
    NO_TOOLS,
    Batch,
    Curve,
    Named,
    Output,
    Record,
    Sample,
    Scores,
    Tools,
    Vector,
    real_rows,
    token_specimens,
    was,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from shoal.models.anatomy import Anatomy

_HIDDEN, _REPLACED = 0.8, 0.1
"""Of the targets; the rest stay as they are. Section 3.1 of the paper."""


class MaskedLM(CausalLM):
    """Some tokens of each row are targets, other ones each time that it is read.

    Which ones, and what stands in their place, is a function of (seed, source, sample id, position)
    alone. Special tokens are never targets.
    """

    kind = "masked-lm"
    auto_class = "AutoModelForMaskedLM"
    causal = False
    masks = True
    target_name = "hidden tokens"
    curve = Curve("nats per hidden token", "unigram_loss", "unigram baseline")

    def learn(self, records: Iterable[Record], *, tools: Tools = NO_TOOLS) -> dict[str, Any]:
        """`{"mask": id, "special": ids, "vocabulary": size}`. DataError without a mask token."""
        tokenizer, text = tools.tokenizer, tools.special_texts.get("mask_token")
        mask = None if text is None else tokenizer.token_to_id(text)
        if mask is None:
            raise DataError(
                f"masked-lm: expected a tokenizer with a mask token, got {text or 'none'} in its "
                "tokenizer_config.json\n    use the tokenizer of a model that was pretrained so, "
                "or data.tokenizer.kind=train, which makes one"
            )
        added = tokenizer.get_added_tokens_decoder()
        self.settings = {
            "mask": mask,
            "special": sorted(number for number, token in added.items() if token.special),
            "vocabulary": tokenizer.get_vocab_size(with_added_tokens=True),
        }
        return self.settings

    def encode(self, records: Sequence[Record], *, tools: Tools) -> list[Sample]:
        """Documents as a language model has them, each token with itself for a label."""
        samples = super().encode(records, tools=tools)
        special = self.settings["special"]
        for sample in samples:
            ids = np.asarray(sample["input_ids"], dtype=np.int64)
            sample["labels"] = np.where(np.isin(ids, special), IGNORED, ids)
        return samples

    def drawn(self, batch: Batch, *, seed: int) -> Batch:
        """`labels` [B, T] that stay targets, and `input_ids` [B, T] with them hidden."""
        labels, ids = np.asarray(batch["labels"]), np.asarray(batch["input_ids"])
        places = np.arange(labels.shape[1], dtype=np.uint64)
        rows = mixed(np.asarray(batch["source_ids"]).astype(np.uint64) + mixed(np.uint64(seed)))
        rows = mixed(np.asarray(batch["sample_ids"]).astype(np.uint64) + rows)
        words = mixed(places + rows[:, None])
        chosen, how = (uniform(mixed(words + np.uint64(number))) for number in (1, 2))
        is_target = (chosen < self.options.get("mask_probability", 0.15)) & (labels != IGNORED)
        other = mixed(words + np.uint64(3)) % np.uint64(self.settings["vocabulary"])
        hidden = np.where(how < _HIDDEN, self.settings["mask"], other.astype(ids.dtype))
        changed = is_target & (how < _HIDDEN + _REPLACED)
        return {
            **batch,
            "labels": np.where(is_target, labels, IGNORED),
            "input_ids": np.where(changed, hidden, ids),
        }

    def specimens(self, config: Any) -> list[Sample]:
        """Rows of which every third token is a target, and another one stands in its place."""
        samples = token_specimens(config)
        for sample in samples:
            ids = sample["input_ids"]
            is_target = np.arange(len(ids)) % 3 == 1
            sample["labels"] = np.where(is_target, ids, IGNORED)
            sample["input_ids"] = np.where(is_target, np.roll(ids, 1), ids)
        return samples

    def user_call(self, batch: Batch) -> dict[str, Tensor]:
        """As transformers' collator for masked language modelling gives it: nothing is shifted."""
        call = super().user_call(batch)
        return {**call, "labels": batch["labels"]}

    def output(self, model: nn.Module, anatomy: Anatomy, batch: Batch, *, step: int = 0) -> Output:
        """Hidden states [B, T, D] and the labels [B, T] of hidden tokens."""
        return classify_tokens(model, batch, step=step)

    def metrics(self) -> MaskedMetrics:
        """A fresh accumulator."""
        return MaskedMetrics()

    def words(self, before: Named | None, after: Named) -> list[str]:
        """Accuracy and perplexity of hidden tokens, the unigram baseline's beside."""
        loss, guess = after["evaluation_loss"], after["unigram_loss"]
        worse = "" if loss < guess else "; the model is still no better than it"
        return [
            f"hidden tokens: {was(before, 'accuracy', 3)}{after['accuracy']:.3f} found now; "
            f"perplexity: {was(before, 'perplexity', 0)}{after['perplexity']:.1f} now; unigram "
            f"baseline: {math.exp(guess):.0f} (loss {loss:.3f} against {guess:.3f} nats per token, "
            f"ratio {loss / guess:.3f}){worse}"
        ]

    def prompts(self) -> tuple[Sequence[str], int]:
        """None: it completes no text."""
        return (), 0

    def next_command(self, *, run: str, recipe: str) -> str:
        """Score it again: a model of hidden tokens is a start for other tasks."""
        return f"shoal evaluate {run} {recipe}"


class MaskedMetrics(CausalLMMetrics):
    """Sums over hidden tokens: [loss, tokens, tokens found]."""

    needs_predictions = True

    def __init__(self) -> None:
        super().__init__()
        self._right = 0.0

    def add(self, *, batch: Batch, scores: Scores) -> None:
        """Count losses and predictions [B, T], but for rows that only fill the batch."""
        super().add(batch=batch, scores=scores)
        assert scores.predictions is not None, "hidden tokens are scored by the predictions"
        rows = real_rows(batch)
        labels = np.asarray(batch["labels"])[rows]
        guesses = np.asarray(scores.predictions)[rows]
        self._right += float(((guesses == labels) & (labels != IGNORED)).sum())

    def vector(self) -> Vector:
        """[loss, tokens, tokens found]."""
        return np.append(super().vector(), self._right)

    def result(self, vector: Vector | None = None) -> Named:
        """Mean loss, its perplexity, and the share of hidden tokens that were found."""
        sums = self.vector() if vector is None else vector
        scores = super().result(sums[:2])
        targets = scores.pop("evaluation_targets")
        found = float(sums[2]) / targets if targets else math.nan
        return {**scores, "accuracy": found, "evaluation_targets": targets}


def uniform(words: Words) -> NDArray[np.float64]:
    """Numbers in [0, 1) from the upper bits of mixed words."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
