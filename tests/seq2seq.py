"""An encoder-decoder trained by the product's own workers, until a task of it is shipped.

`run` is what each worker does: it reads tokens in the encoder, and predicts them in the decoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shoal.engine import build, worker
from shoal.tasks.causal_lm import CausalLM, classify_tokens
from shoal.tasks.task import Batch, Output

if TYPE_CHECKING:
    from torch import nn

    from shoal.models.anatomy import Anatomy


class Seq2Seq(CausalLM):
    """The labels of language modelling, from a decoder that sees what stands before each."""

    auto_class = "AutoModelForSeq2SeqLM"
    packs = False

    def output(self, model: nn.Module, anatomy: Anatomy, batch: Batch, *, step: int = 0) -> Output:
        shown = {**batch, "decoder_input_ids": batch["input_ids"]}
        return classify_tokens(model, shown, step=step)

    def prompts(self) -> tuple[tuple[str, ...], int]:
        return (), 0


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of one worker."""
    build.create_task = lambda kind, **given: Seq2Seq()  # type: ignore[assignment]
    return worker.run(payload, descriptor)
