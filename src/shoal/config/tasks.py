"""Sections of the recipe that name a task, by `kind`. Data only."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag

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


class Preference(Section):
    """Prefer one answer to another (DPO): the model without its adapter is the reference."""

    kind: Literal["preference"] = "preference"
    beta: Annotated[float, Field(gt=0.0)] = 0.1
    """How strongly it is held to the reference."""
    reference: Literal["adapter-off", "none"] = "adapter-off"
    """none: the model's own likelihoods alone, as SimPO has it (with length_normalised)."""
    length_normalised: bool = False
    """Likelihoods per token of the answer, not of all of it."""
    margin: Annotated[float, Field(ge=0.0)] = 0.0
    """By how much the preferred answer is to win (SimPO's gamma)."""
    sft_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the cross entropy of the preferred answer, per token, that is added."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Share of pairs that may be labelled the wrong way round (conservative DPO)."""


class Distillation(Section):
    """Predict the next token as a larger model does."""

    kind: Literal["distillation"] = "distillation"
    teacher: str
    """A folder, a name of `shoal data list`, or owner/name of the hub; of the same tokenizer."""
    teacher_weight: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of the teacher's probabilities in the loss; the rest is the tokens'."""
    temperature: Annotated[float, Field(gt=0.0)] = 2.0
    """What both models' logits are divided by before they are compared."""
    prompts: tuple[str, ...] = ()
    """Completed at every evaluation, so that progress can be read."""
    sample_tokens: Count = 48
    """Tokens generated for each prompt."""


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


class ObjectDetection(Section):
    """Find objects in images: a box and a class for each."""

    has_tokens: ClassVar[bool] = False
    kind: Literal["object-detection"] = "object-detection"
    grid: Annotated[int, Field(ge=1, le=32)] = 6
    """Cells along a side of an image; each finds at most one object, whose middle is in it."""


class Recommendation(Section):
    """Tell what each user takes next, of all items."""

    has_tokens: ClassVar[bool] = False
    kind: Literal["recommendation"] = "recommendation"


class Translation(Section):
    """Translate: an encoder reads a text, a decoder writes it in another language."""

    kind: Literal["translation"] = "translation"
    prefix: str | None = None
    """Stands before every source, as T5 was trained: `translate English to German: `."""


class SpeechRecognition(Section):
    """Write down what is said in recordings, with a Whisper model."""

    kind: Literal["speech-recognition"] = "speech-recognition"
    longest_seconds: Annotated[int, Field(ge=1, le=30)] = 30
    """Sound that the model reads, silence behind what is shorter; longer recordings are left out.
    Below 30 it costs less, and the exported model reads no more."""


TaskSection = Annotated[
    CausalLM
    | Chat
    | MaskedLM
    | Preference
    | Distillation
    | SequenceClassification
    | TokenClassification
    | SpanAnswering
    | ImageClassification
    | ObjectDetection
    | Recommendation
    | Translation
    | SpeechRecognition,
    Field(discriminator="kind"),
]


def _import_path(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
        raise ValueError(f"expected how Python imports a class, my_module:MyTask; got {text!r}")
    return text


class OwnTask(Section):
    """A task of your own, by the path of its class; other keys are its options."""

    model_config = ConfigDict(extra="allow")
    kind: Annotated[str, AfterValidator(_import_path)]
    """my_module:MyTask; the module is installed, or in a folder that PYTHONPATH names."""


OWN, SHIPPED = "my_module:MyTask", "a kind of shoal"
"""Whose task it is; pydantic puts it into the place of an error, where it is left out again."""


def _whose(section: Any) -> str:
    kind = section.get("kind") if isinstance(section, dict) else getattr(section, "kind", None)
    return OWN if isinstance(kind, str) and ":" in kind else SHIPPED


AnyTask = Annotated[
    Annotated[TaskSection, Tag(SHIPPED)] | Annotated[OwnTask, Tag(OWN)], Discriminator(_whose)
]


def has_tokens(task: Section) -> bool:
    """Whether the samples of a task are text."""
    return bool(getattr(task, "has_tokens", True))
