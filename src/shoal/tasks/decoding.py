"""Encoder-decoders: their decoder's inputs, and what they write by themselves (greedy search).

Shapes: B rows, T tokens of the target, L tokens written, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shoal.fields import IGNORED
from shoal.models.anatomy import logits_in
from shoal.tasks.losses import TokenCrossEntropy
from shoal.tasks.task import Output, Scores, Vocabulary


@dataclass(frozen=True)
class Writing(TokenCrossEntropy):
    """Cross entropy of the target's tokens; predictions are what `write` makes of the batch."""

    write: Callable[[Vocabulary | None], Tensor] = lambda vocabulary: torch.empty(0)

    def each(
        self, output: Output, *, vocabulary: Vocabulary | None = None, predict: bool = False
    ) -> Scores:
        """The loss of each target [B, T], and what the model writes when asked for."""
        found = super().each(output, vocabulary=vocabulary)
        return Scores(found.losses, self.write(vocabulary) if predict else None)


def decoder_inputs(model: nn.Module, labels: Tensor) -> Tensor:
    """Labels [B, T] moved to the right behind the start token, as the model's class does it."""
    rule: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if rule is not None:
        found: Tensor = rule(labels=labels)
        return found
    config: Any = model.config
    moved = labels.roll(1, dims=1)
    moved[:, 0] = config.decoder_start_token_id
    return moved.masked_fill(moved == IGNORED, config.pad_token_id)


@torch.no_grad()
def greedy(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    begin: Tensor,
    end: int,
    most: int,
    vocabulary: Vocabulary | None = None,
    forbidden: slice = slice(0, 0),
) -> Tensor:
    """The likeliest token after each other, up to `end` or `most` of them: int64 [B, L].

    `inputs`: what the encoder reads. `begin` int64 [B, P]: how the decoder starts. What stands
    behind a row's end is -100. `forbidden` tokens are never written. A model that was cut computes
    all `most` steps on every rank, since all ranks take part in each.
    """
    whole: Any = model
    memory = whole.get_encoder()(**inputs)
    mask = {"attention_mask": inputs["attention_mask"]} if "attention_mask" in inputs else {}
    # parameters that were cut know the ranks that they are cut over
    is_cut = vocabulary is not None or any(hasattr(p, "device_mesh") for p in model.parameters())
    cache, step, written = None, begin, []
    open_rows = torch.ones(len(begin), dtype=torch.bool, device=begin.device)
    for _ in range(most):
        made = whole(
            encoder_outputs=memory,
            decoder_input_ids=step,
            past_key_values=cache,
            use_cache=True,
            **mask,
        )
        cache = made.past_key_values
        logits = logits_in(made)[:, -1]
        logits = logits if vocabulary is None else vocabulary.gather(logits)
        logits[:, forbidden] = -torch.inf
        token = logits.argmax(dim=-1)
        open_rows = open_rows & (token != end)
        written.append(token.masked_fill(~open_rows, IGNORED))
        step = token[:, None]
        if not is_cut and not bool(open_rows.any()):
            break
    return torch.stack(written, dim=1)


def padded(ids: Tensor, *, length: int) -> Tensor:
    """Rows [B, L] filled up with -100 to [B, length]."""
    return torch.nn.functional.pad(ids, (0, length - ids.shape[1]), value=IGNORED)
