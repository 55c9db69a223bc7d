"""Encoder-decoders trained by the product's own parts, until a task of them is shipped.

The encoder reads a document; the decoder gives its tokens from the second on, each from those
before it. `run` is what each worker of such a run does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from shoal.engine import build, worker
from shoal.fields import IGNORED
from shoal.tasks.causal_lm import CausalLM, classify_tokens
from shoal.tasks.task import Batch, Output, Task

if TYPE_CHECKING:
    from torch import nn

    from shoal.models.anatomy import Anatomy


class Seq2Seq(CausalLM):
    """The labels of language modelling, from a decoder that sees what stands before each."""

    kind = "sequence-to-sequence"
    auto_class = "AutoModelForSeq2SeqLM"
    packs = False
    causal = False  # its encoder reads whole documents

    def model_settings(self) -> dict[str, Any]:
        """Special tokens, which published models have at the end of their vocabulary."""
        return {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}

    def user_call(self, batch: Batch) -> dict[str, torch.Tensor]:
        """transformers makes the decoder's inputs of the labels."""
        return Task.user_call(self, batch)

    def output(self, model: nn.Module, anatomy: Anatomy, batch: Batch, *, step: int = 0) -> Output:
        shown = decoder_inputs(model, batch["labels"])
        return classify_tokens(model, {**batch, "decoder_input_ids": shown}, step=step)

    def prompts(self) -> tuple[tuple[str, ...], int]:
        return (), 0


def decoder_inputs(model: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """Labels [B, T] moved to the right as the model's class does; some have no public rule."""
    rule: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if rule is not None:
        found: torch.Tensor = rule(labels=labels)
        return found
    config: Any = model.config
    moved = labels.roll(1, dims=1)
    moved[:, 0] = config.decoder_start_token_id
    return moved.masked_fill(moved == IGNORED, config.pad_token_id)


def create_task(kind: str, **given: Any) -> Seq2Seq:
    """In place of the product's `tasks.kinds.create`."""
    return Seq2Seq()


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of one worker."""
    build.create_task = create_task
    return worker.run(payload, descriptor)
