"""Language modelling: predict the next token of a text. Scores: loss and perplexity."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.errors import DataError
from shoal.fields import IGNORED
from shoal.tasks.baselines import unigram_nats
from shoal.tasks.scores import MeanLoss
from shoal.tasks.task import (
    Batch,
    Curve,
    Evaluated,
    Metrics,
    Named,
    Output,
    Record,
    Sample,
    Task,
    Tools,
    Vector,
    token_specimens,
    was,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal.models.anatomy import Anatomy


class CausalLM(Task):
    """Next-token prediction. Batches carry labels that are already shifted."""

    kind = "causal-lm"
    auto_class = "AutoModelForCausalLM"
    packs = True
    runs_once = True
    causal = True
    token_losses = True
    closes_documents = True
    target_name = "target tokens"
    curve = Curve("nats per token", baseline="unigram_loss", baseline_name="unigram baseline")
    own_data = "YOUR.txt"

    def encode(self, records: Sequence[Record], *, tools: Tools) -> list[Sample]:
        """`{"text": str}` -> `{"input_ids": [...]}`; each document closes with the end token.

        A begin token comes from the tokenizer's own template. Labels come from the packer.
        """
        texts, tokenizer, end = [_text(r) for r in records], tools.tokenizer, tools.end_token_id
        tokenizer.no_truncation()
        tokenizer.no_padding()
        samples = []
        for encoding in tokenizer.encode_batch_fast(texts):
            ids = list(encoding.ids)
            if end is not None and (not ids or ids[-1] != end):
                ids.append(end)
            samples.append({"input_ids": ids})
        return samples

    def specimens(self, config: Any) -> list[Sample]:
        """Documents; their labels are the packer's."""
        return token_specimens(config)

    def user_call(self, batch: Batch) -> dict[str, Tensor]:
        """transformers shifts the labels itself, and leaves out what is -100."""
        call = super().user_call(batch)
        ignored = call["attention_mask"] == 0
        return {**call, "labels": call["input_ids"].masked_fill(ignored, IGNORED)}

    def output(self, model: nn.Module, anatomy: Anatomy, batch: Batch, *, step: int = 0) -> Output:
        """Hidden states [B, T, D] and shifted labels [B, T]."""
        labels = batch["labels"]
        return classify_tokens(model, batch, step=step, targets=(labels != IGNORED).sum(dim=1))

    def metrics(self) -> Metrics:
        """A fresh accumulator."""
        return CausalLMMetrics()

    def baseline(self, data: Evaluated) -> Named:
        """`unigram_loss`: nats per target of guessing by how often a token is one in training."""
        train = data.training_counts()
        targets = np.zeros_like(train)
        for row in data.rows():
            labels = row["labels"]
            targets += np.bincount(labels[labels >= 0], minlength=len(targets))
        return {"unigram_loss": unigram_nats(targets, train=train)}

    def words(self, before: Named | None, after: Named) -> list[str]:
        """Perplexity before and after, the unigram baseline's beside, and whether it is beaten."""
        loss, guess = after["evaluation_loss"], after["unigram_loss"]
        worse = "" if loss < guess else "; the model is still no better than it"
        return [
            f"perplexity: {was(before, 'perplexity', 0)}{after['perplexity']:.1f} now; unigram "
            f"baseline: {math.exp(guess):.0f} (loss {loss:.3f} against {guess:.3f} nats per token, "
            f"ratio {loss / guess:.3f}){worse}"
        ]

    def prompts(self) -> tuple[Sequence[str], int]:
        """`prompts` and `sample_tokens` of the recipe's task."""
        return self.options.get("prompts", ()), self.options.get("sample_tokens", 0)

    def next_command(self, *, run: str, recipe: str) -> str:
        """Talk to it, in the recipe's own words."""
        first = next(iter(self.options.get("prompts", ())), "YOUR PROMPT").partition("\n")[0]
        return f"shoal generate {run}/model {shlex.quote(first)}"


def classify_tokens(
    model: nn.Module, batch: Batch, *, step: int, targets: Tensor | None = None
) -> Output:
    """Hidden states [B, T, D] of a row of tokens, and the cross entropy of its `labels` [B, T].

    `targets` [B]: of each row, where the loss has the model's balance loss of experts too.
    """
    from shoal.models.anatomy import balanced_hidden_of, head_parameters, logits_of
    from shoal.tasks.losses import TokenCrossEntropy

    hidden, extra = balanced_hidden_of(model, dict(batch), step=step, targets=targets)
    loss = TokenCrossEntropy(logits_of(model), head_parameters(model))
    return Output(hidden, fields={"labels": batch["labels"]}, loss=loss, extra=extra)


class CausalLMMetrics(MeanLoss):
    """The mean loss in nats per target, and its perplexity."""

    def result(self, vector: Vector | None = None) -> Named:
        """Loss, perplexity and number of targets."""
        scores = super().result(vector)
        loss = scores["evaluation_loss"]
        # exp overflows above 709: a diverged run reads as infinite, not as an exception
        perplexity = math.inf if loss >= 700 else math.exp(loss)
        targets = scores.pop("evaluation_targets")
        return {**scores, "perplexity": perplexity, "evaluation_targets": targets}


def _text(record: Record) -> str:
    text = record.get("text")
    if not isinstance(text, str):
        raise DataError(
            f"causal-lm: expected a record with a string under 'text', got keys {sorted(record)}\n"
            "    name the column that holds the text (data.text_field), or use another task.kind"
        )
    return text
