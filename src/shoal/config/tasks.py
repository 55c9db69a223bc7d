"""Sections of the recipe that name a task, by `kind`. Data only."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from shoal.config.section import Count, Section


class CausalLM(Section):
    """Predict the next token."""

    kind: Literal["causal-lm"] = "causal-lm"
    prompts: tuple[str, ...] = ()
    """Completed at every evaluation, so that progress can be read."""
    sample_tokens: Count = 48
    """Tokens generated for each prompt."""


class Chat(Section):
    """Learn the answers of conversations, in the words of the model's chat template."""

    kind: Literal["chat"] = "chat"
    train_on: Literal["answers", "all", "last"] = "answers"
    """Where the loss is: all answers of the assistant, every token, or the last answer."""
    prompts: tuple[str, ...] = ()
    """What a user says first; answered at every evaluation, so that progress can be read."""
    sample_tokens: Count = 48
    """Tokens generated for each answer."""


class MaskedLM(Section):
    """Predict hidden tokens from those on both sides, as BERT is pretrained."""

    kind: Literal["masked-lm"] = "masked-lm"
    mask_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens that are targets. Of them 80 % are hidden, 10 % replaced by any other,
    10 % left as they are."""


class SpanAnswering(Section):
    """Find the answer to a question in a text."""

    kind: Literal["span-answering"] = "span-answering"


class TokenClassification(Section):
    """Give every word a tag, such as a named entity."""

    kind: Literal["token-classification"] = "token-classification"


class SequenceClassification(Section):
    """Give every text a class, one of two, or a number."""

    kind: Literal["sequence-classification"] = "sequence-classification"
    objective: Literal["classes", "binary", "number"] = "classes"
    """classes: cross entropy; binary: one logit and the binary cross entropy; number: one output
    and the squared error."""
    label_field: str | None = None
    """Column of the labels; None: label, class, sentiment, ..., whichever there is."""


class ImageClassification(Section):
    """Give every image one of several classes."""

    has_tokens: ClassVar[bool] = False
    kind: Literal["image-classification"] = "image-classification"
    shift_pixels: Annotated[int, Field(ge=0)] = 0
    """While training, images are moved by up to so many pixels up or down and left or right, each
    time they are read by other ones."""


TaskSection = Annotated[
    CausalLM
    | Chat
    | MaskedLM
    | SpanAnswering
    | SequenceClassification
    | TokenClassification
    | ImageClassification,
    Field(discriminator="kind"),
]


def has_tokens(task: Section) -> bool:
    """Whether the samples of a task are text."""
    return bool(getattr(task, "has_tokens", True))
