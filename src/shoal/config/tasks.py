"""Sections of the recipe that name a task, by `kind`. Data only."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag

from shoal.config.section import Count, Section
from shoal.environment import python_path

ENTRY_POINTS = "shoal.tasks"
"""Group in which an installed package lists its tasks: `NAME = my_module:MyTask`."""


_ONE = threading.RLock()
"""Workers may be threads, and share the path."""


def _import_path(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
        raise ValueError(f"expected how Python imports it, my_module:MyTask; got {text!r}")
    return text


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


class Reinforcement(Section):
    """Learn to act in an environment by trying (PPO)."""

    has_tokens: ClassVar[bool] = False
    kind: Literal["reinforcement"] = "reinforcement"
    environment: str
    """A name of gymnasium's, such as CartPole-v1; my_module:Mine-v0 imports the module first."""
    actors: Count = 8
    """Environments that are played beside one another; workers share them."""
    rollout_steps: Count = 256
    """Steps of each actor between two times of learning."""
    epochs: Count = 10
    """How often what was played is learned from; train.global_batch_samples of it in a step."""
    gamma: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.99
    """What a reward is worth one step later."""
    gae_lambda: Annotated[float, Field(ge=0.0, le=1.0)] = 0.95
    """Of generalised advantage estimation: 0 trusts the values, 1 the rewards."""
    clip: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """How far an action's probability may move, relative to what it was, before it is let be."""
    value_coefficient: Annotated[float, Field(ge=0.0)] = 0.5
    """Weight of the squared error of the values."""
    entropy_coefficient: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the entropy of the actions, which is to be high."""


class GRPO(Section):
    """Answer prompts so that a reward rises (group relative policy optimisation)."""

    kind: Literal["grpo"] = "grpo"
    reward: Annotated[str, AfterValidator(_import_path)]
    """my_module:my_reward, a function of a completion and its record that gives a number."""
    group: Annotated[int, Field(ge=2)] = 8
    """Completions of each prompt, which are compared with one another."""
    completion_tokens: Count = 64
    """Tokens of a completion at most."""
    epochs: Count = 1
    """Steps that learn from the same completions."""
    clip: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """How far a token's probability may move, relative to what it was, before it is let be."""
    clip_above: Annotated[float, Field(gt=0.0)] | None = None
    """The same upwards; None: as `clip`."""
    kl_coefficient: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the divergence from the model without its adapter."""
    prompts: tuple[str, ...] = ()
    """Completed at every evaluation, so that progress can be read."""
    sample_tokens: Count = 48
    """Tokens generated for each prompt."""


class Embedding(Section):
    """Vectors of texts, in which questions lie near the texts that answer them."""

    kind: Literal["embedding"] = "embedding"
    temperature: Annotated[float, Field(gt=0.0)] = 0.05
    """What cosines are divided by before they are compared."""
    symmetric: bool = True
    """Also tell the question of each text, not only the text of each question."""
    query_tokens: Annotated[int, Field(ge=4)] = 32
    """Tokens that a question is cut to; its text has the rest of the row."""
    query_prefix: str = ""
    """What the model reads before each question, such as `query: `."""
    text_prefix: str = ""
    """What it reads before each text, such as `passage: `."""


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
    | Reinforcement
    | GRPO
    | Embedding
    | Translation
    | SpeechRecognition,
    Field(discriminator="kind"),
]


@contextmanager
def not_from_here() -> Iterator[None]:
    """Python finds what is installed or what PYTHONPATH names, not what the current folder has.

    A recipe from elsewhere may come with a file beside it.
    """
    with _ONE:
        before, here = list(sys.path), {"", os.getcwd()} - set(python_path())
        sys.path[:] = [each for each in before if each not in here]
        try:
            yield
        finally:
            sys.path[:] = before


def installed_tasks() -> dict[str, list[str]]:
    """Tasks of installed packages: by short name the paths of their classes, one if all is well."""
    found: dict[str, list[str]] = {}
    with not_from_here():
        for each in entry_points(group=ENTRY_POINTS):
            if each.value not in found.setdefault(each.name, []):
                found[each.name].append(each.value)
    return found


def _task_path(text: str) -> str:
    return text if ":" not in text and text in installed_tasks() else _import_path(text)


class OwnTask(Section):
    """A task of your own, by its name or the path of its class; other keys are its options."""

    model_config = ConfigDict(extra="allow")
    kind: Annotated[str, AfterValidator(_task_path)]
    """The name under which an installed package lists it; or my_module:MyTask, where the module is
    installed or in a folder that PYTHONPATH names."""


OWN, SHIPPED = "my_module:MyTask", "a kind of shoal"
"""Whose task it is; pydantic puts it into the place of an error, where it is left out again."""


SHIPPED_KINDS = frozenset(
    section.model_fields["kind"].default for section in get_args(get_args(TaskSection)[0])
)


def _whose(section: Any) -> str:
    kind = section.get("kind") if isinstance(section, dict) else getattr(section, "kind", None)
    if not isinstance(kind, str) or kind in SHIPPED_KINDS:
        return SHIPPED
    return OWN if ":" in kind or kind in installed_tasks() else SHIPPED


AnyTask = Annotated[
    Annotated[TaskSection, Tag(SHIPPED)] | Annotated[OwnTask, Tag(OWN)], Discriminator(_whose)
]


def has_tokens(task: Section) -> bool:
    """Whether the samples of a task are text."""
    return bool(getattr(task, "has_tokens", True))
