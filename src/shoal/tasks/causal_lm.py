"""Language modelling: predict the next token of a text. Scores: loss and perplexity."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.errors import DataError
from shoal.tasks.outcome import (
    IGNORED,
    Record,
    Sample,
    TaskOutput,
    Vector,
    counted_rows,
    output_of,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal.models.anatomy import Anatomy

END_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<|end|>",
    "<|im_end|>",
    "[EOS]",
    "[SEP]",
)
"""Names under which tokenizers keep their end token, best known first."""


def end_token_id(tokenizer: Any, *, name: str | None = None) -> int | None:
    """Id of the tokenizer's end token: of `name` when given, else of the first known name it has.

    Raises DataError when `name` is given and the tokenizer lacks it.
    """
    if name is not None:
        found: int | None = tokenizer.token_to_id(name)
        if found is None:
            raise DataError(
                f"tokenizer: it has no token {name!r}, which its settings name as the end token\n"
                "    use the tokenizer that belongs to the model"
            )
        return found
    known = (tokenizer.token_to_id(each) for each in END_TOKENS)
    return next((each for each in known if each is not None), None)


class CausalLM:
    """Next-token prediction. Batches carry labels that are already shifted."""

    kind = "causal-lm"
    auto_class = "AutoModelForCausalLM"
    packable = True

    def __init__(self, settings: dict[str, Any] | None = None) -> None:
        self._settings = dict(settings or {})

    def settings(self, records: list[Record]) -> dict[str, Any]:
        """Nothing is learned from the data; `end_token` (a name) may be set by the caller."""
        return dict(self._settings)

    def model_settings(self) -> dict[str, Any]:
        """The configuration gets nothing from this task."""
        return {}

    def encode(self, records: list[Record], *, tokenizer: Any) -> list[Sample]:
        """`{"text": str}` -> `{"input_ids": [...]}`; each document closes with the end token.

        A begin token comes from the tokenizer's own template. Labels come from the packer.
        """
        texts = [_text(record) for record in records]
        end = end_token_id(tokenizer, name=self._settings.get("end_token"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        samples = []
        for encoding in tokenizer.encode_batch_fast(texts):
            ids = list(encoding.ids)
            if end is not None and (not ids or ids[-1] != end):
                ids.append(end)
            samples.append({"input_ids": ids})
        return samples

    def forward(
        self, model: nn.Module, anatomy: Anatomy, batch: dict[str, Tensor], *, step: int = 0
    ) -> TaskOutput:
        """Hidden states [B, T, D] and shifted labels [B, T]."""
        return output_of(model, batch=batch, step=step)

    def metrics(self) -> CausalLMMetrics:
        """A fresh accumulator."""
        return CausalLMMetrics()


class CausalLMMetrics:
    """Sums of loss and targets: [loss, targets]."""

    needs_predictions = False

    def __init__(self) -> None:
        self._sums = np.zeros(2)

    def add(
        self, *, batch: dict[str, Tensor], losses: Tensor, predictions: Tensor | None = None
    ) -> None:
        """Count `losses` [B, T] (0 without a target), but for rows that only fill the batch."""
        targets = batch["labels"] != IGNORED
        rows = counted_rows(batch)
        if rows is not None:
            targets = targets & rows[:, None]
        self._sums += [float((losses.double() * targets).sum()), float(targets.sum())]

    def vector(self) -> Vector:
        """[loss, targets]."""
        return self._sums.copy()

    def result(self, vector: Vector | None = None) -> dict[str, float]:
        """Mean loss in nats per target, its perplexity, and the number of targets."""
        total, targets = self._sums if vector is None else vector
        if not targets:
            return {"evaluation_loss": math.nan, "perplexity": math.nan, "evaluation_targets": 0.0}
        mean = float(total / targets)
        return {
            "evaluation_loss": mean,
            # exp overflows above 709: a diverged run reads as infinite, not as an exception
            "perplexity": math.exp(mean) if mean < 700 else math.inf,
            "evaluation_targets": float(targets),
        }


def _text(record: Record) -> str:
    text = record.get("text")
    if not isinstance(text, str):
        raise DataError(
            f"causal-lm: expected a record with a string under 'text', got keys {sorted(record)}\n"
            "    name the column that holds the text (data.text_column), or use another task.kind"
        )
    return text
