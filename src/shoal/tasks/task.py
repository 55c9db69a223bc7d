"""What a task is: how records become samples, a batch becomes a loss, and scores become words.

A new task is a subclass of `Task` in a file of its own and a line in `kinds.py`;
docs/contribute/new-task.md has one of 40 lines. Importable without torch: a task imports it where
it computes.
Shapes: B rows of a batch, D hidden size; [...] is whatever the targets' shape is ([B, T] of tokens,
[B] of images).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from shoal.errors import DataError
from shoal.fields import IGNORED, TOKENS, Fields
from shoal.tasks.playing import Batches, Play, Stored

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal.models.anatomy import Anatomy

Record = dict[str, Any]
Sample = dict[str, Any]
Batch = Mapping[str, Any]
Vector = NDArray[np.float64]
Named = dict[str, float]
"""Figures by name, as a row of metrics.jsonl has them."""


@dataclass(frozen=True)
class Tools:
    """What turns raw records into numbers; None: this task does not ask for it."""

    tokenizer: Any = None
    end_token_id: int | None = None
    """What closes a document; None: nothing does."""
    chat_template: tuple[str, str] | None = None
    """The tokenizer's, and the file that has it."""
    special_texts: dict[str, str] = field(default_factory=dict)
    """Special tokens by name (eos_token), as chat templates read them."""
    sequence_tokens: int | None = None
    """What a row of tokens is cut to."""


NO_TOOLS = Tools()


@dataclass(frozen=True)
class Scores:
    """Of a batch, per target: its loss (0 where there is none), and what the model says."""

    losses: Tensor
    predictions: Tensor | None = None


class Vocabulary(Protocol):
    """The part of the head's outputs that this rank has: `size` of them from `start` on."""

    @property
    def start(self) -> int: ...

    @property
    def size(self) -> int: ...

    def exchange(self, mine: Tensor) -> Tensor:
        """`mine` [K, N] of every rank that has a part: [ranks, K, N], in rank order."""

    def gather(self, part: Tensor) -> Tensor:
        """This rank's part of the outputs [..., size]: all of them, on every rank."""


class Loss(Protocol):
    """A loss that is a sum over targets."""

    def total(self, output: Output, *, vocabulary: Vocabulary | None, scale: float) -> Tensor:
        """The SUM over targets, float32 or wider; differentiable once.

        `vocabulary`: the head was cut and gives this rank's part. `scale`: what the caller will
        multiply the sum by before backward; gradients made here may use it, and float16 needs it.
        """

    def each(self, output: Output, *, vocabulary: Vocabulary | None, predict: bool) -> Scores:
        """The loss of each target, and the predictions when asked for; no gradients."""


@dataclass(frozen=True)
class Output:
    """What a model made of a batch: hidden states [..., D], what the loss reads beside, the loss.

    `extra`: scalars that are added to the sum as they are, such as the balance loss of experts.
    """

    hidden: Tensor
    fields: Mapping[str, Tensor]
    loss: Loss
    extra: tuple[Tensor, ...] = ()

    def total(self, *, vocabulary: Vocabulary | None = None, scale: float = 1.0) -> Tensor:
        """The sum of the loss over all targets, and of the extra terms."""
        total = self.loss.total(self, vocabulary=vocabulary, scale=scale)
        for term in self.extra:
            total = total + term
        return total

    def each(self, *, vocabulary: Vocabulary | None = None, predict: bool = False) -> Scores:
        """Scores of each target, for an evaluation."""
        return self.loss.each(self, vocabulary=vocabulary, predict=predict)


class Metrics(Protocol):
    """Scores of evaluation batches as one vector of sums, so that ranks add theirs up."""

    needs_predictions: bool

    def add(self, *, batch: Batch, scores: Scores) -> None:
        """Count one batch; rows whose sample id is negative only fill it and do not count."""

    def vector(self) -> Vector:
        """Everything counted so far; vectors of ranks are summed elementwise."""

    def result(self, vector: Vector | None = None) -> Named:
        """Named scores of a (summed) vector, `evaluation_loss` among them; None: of this one."""


@runtime_checkable
class Pictured(Metrics, Protocol):
    """Scores that a picture can be drawn of, from the sums and a few examples beside them."""

    @property
    def examples(self) -> Sequence[Sequence[Any]]:
        """`[source id, sample id, JSON-able example]` of some samples of those that were added.

        Those with the smallest ids, at most as many as the picture has: then the first ones of
        all ranks together do not depend on the layout.
        """

    def shown(self, vector: Vector, examples: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """What `Task.draw` needs, JSON-able: of the summed vector, and the examples of all ranks.

        `examples` are in the order of their ids.
        """


class Evaluated(Protocol):
    """The samples that a run is scored on, with those that it learns from: a baseline's material.

    The data's `Evaluation` is one.
    """

    @property
    def names(self) -> Sequence[str]:
        """The sources of the samples that are scored, by their number in `source_ids`."""

    def rows(self) -> Iterator[Sample]:
        """The samples that are scored, one by one."""

    def training_rows(self) -> Iterator[Sample]:
        """The samples of the training part, one by one."""

    def training_counts(self) -> NDArray[np.int64]:
        """How often each label is a target of the training part."""


@dataclass(frozen=True)
class Curve:
    """How the loss is drawn: what it is measured in, and which score of the baseline is a loss."""

    unit: str
    baseline: str | None = None
    baseline_name: str = ""
    is_scored: bool = True
    """Whether `evaluation_loss` is the same loss, and drawn beside it."""


class Task(ABC):
    """One objective. What has a default here is what a task may leave out."""

    kind: ClassVar[str]
    auto_class: ClassVar[str]
    """The auto class of transformers that has this task's head."""
    packs: ClassVar[bool] = False
    """Whether several samples may share a row."""
    closes_documents: ClassVar[bool] = False
    """Whether the tokenizer's end token comes after each sample."""
    causal: ClassVar[bool] = False
    """Whether a position is to be predicted from those before it alone."""
    needs_tokenizer: ClassVar[bool] = True
    writes_text: ClassVar[bool] = False
    """Whether its scores read what the model writes: workers then have the `tokenizer`."""
    reads_words: ClassVar[bool] = False
    """Whether texts come as single words, so that a tokenizer puts the space before each itself."""
    whole_logits: ClassVar[bool] = False
    """Whether the loss reads whole rows of a vocabulary's logits: no axis then cuts the head."""
    token_losses: ClassVar[bool] = False
    """Whether its loss is a sum over the tokens of a row, each of which reads its own hidden state
    alone: then rows may be cut along the sequence. A class with an `output` of its own says it
    itself."""
    runs_once: ClassVar[bool] = False
    """Whether `output` runs the model once, by `hidden_of` on the batch, and all else follows from
    those states: then its blocks can be divided into the stages of a pipeline."""
    masks: ClassVar[bool] = False
    """Whether the tokenizer needs a token that stands for a hidden one."""
    labels: ClassVar[str | None] = None
    """The setting that lists the names of its labels, by id; None: it has none."""
    plays: ClassVar[bool] = False
    """Whether it makes its batches of what the model does (`batches`), so that no step can be timed
    before a run."""
    loss_falls: ClassVar[bool] = True
    """Whether a loss that stays above its start is a sign that the run diverges."""
    compares: ClassVar[bool] = False
    """Whether the loss of a sample reads the others of its step: then `seen` and `compared` say
    what of them."""
    target_name: ClassVar[str] = "targets"
    """What is counted, in the plural."""
    curve: ClassVar[Curve] = Curve("nats per target")
    own_data: ClassVar[str] = "YOUR.jsonl"
    """A source of one's own, in the example that ends a run."""
    picture: ClassVar[str | None] = None
    """Name of the picture that is drawn at the end of a run (`confusion.png`), if there is one.

    Then the task's metrics are `Pictured`, and it has `draw`.
    """

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "output" in vars(cls) and "token_losses" not in vars(cls):
            cls.token_losses = False  # not inherited with another loss

    def __init__(
        self, settings: Mapping[str, Any] | None = None, *, options: Mapping[str, Any] | None = None
    ) -> None:
        """`settings`: what `learn` gave, for a task that goes on with what it learned.

        `options`: the recipe's section `task`; keys that are not there have their defaults.
        """
        self.settings = dict(settings or {})
        self.options = dict(options or {})
        self.notes: list[str] = []
        """What `learn` has to say about the data, for people."""
        self.model_config: Any = None
        """transformers' configuration of the model, where this is a worker."""
        self.tokenizer: Any = None
        """Where this is a worker of a task that writes text."""
        self.companion: nn.Module | None = None
        """The frozen model of `companion_path`, where this is a worker that trains."""

    @property
    def companion_path(self) -> str | None:
        """A second, frozen model that the loss needs: a folder, registry name or hub id."""
        return None

    @property
    def fields(self) -> Fields:
        """What a batch has, beside sample_ids and source_ids; what was learned may shape it."""
        return TOKENS

    def learn(self, records: Iterable[Record], *, tools: Tools = NO_TOOLS) -> dict[str, Any]:
        """What the task learns from all records once, remembered; JSON-able; `create` takes it."""
        return self.settings

    def named_by(self, config: Mapping[str, Any], *, scored: bool) -> dict[str, Any]:
        """What was learned, with the ids that a model gives the same labels (its config.json).

        A model that is trained and has other labels gets those of the data. One that is `scored`
        keeps its own: raises DataError for a label of the data that it does not know.
        """
        if self.labels is None:
            return self.settings
        theirs, named = self.settings[self.labels], labels_of(config)
        unknown = [each for each in theirs if each not in named]
        if scored and unknown:
            listed = ", ".join(named[:20]) + (", ..." if len(named) > 20 else "")
            raise DataError(
                f"{self.kind}: the model does not know the label {unknown[0]!r} of the data; its "
                f"config.json names {listed or 'no labels'}\n    score it on data that is labelled "
                "as what it was trained on, or train it on this"
            )
        if scored or sorted(theirs) == sorted(named):
            return {**self.settings, self.labels: named}
        return self.settings

    def model_settings(self) -> dict[str, Any]:
        """Keys that the model's configuration gets from the task."""
        return {}

    def config_keys(self) -> dict[str, Any]:
        """Keys of config.json that say what head the model has: its class, and what is learned."""
        head = self.auto_class.removeprefix("AutoModel")
        return {"architectures": [head], **(self.model_settings() if self.settings else {})}

    @abstractmethod
    def encode(self, records: Sequence[Record], *, tools: Tools) -> list[Sample]:
        """A sample with this task's fields of each record. Raises DataError for what lacks any.

        A sample whose first field is empty is left out of the data.
        """

    @property
    def rows_per_sample(self) -> int:
        """Rows of a batch that are made of one stored sample."""
        return 1

    def batches(self, stored: Stored, *, play: Play | None) -> Batches:
        """Where batches come from: what is stored, or what the task makes of it by `play`.

        Without `play` only their order is asked for.
        """
        return stored

    def scored(self, batch: Batch, play: Play) -> list[Scores]:
        """Scores of an evaluation's batch that are played for; none: its losses are the scores."""
        return []

    def drawn(self, batch: Batch, *, seed: int) -> Batch:
        """A batch as the data gives it, with what the task draws for its samples, such as masks.

        Arrays of numpy, with sample_ids and source_ids: they and `seed` key all that is drawn, so
        that a layout changes nothing. Samples that are scored are asked for with seed 0.
        """
        return batch

    def count(self, batch: Batch) -> int:
        """Targets of a batch (before it is computed): what the loss is divided by."""
        return counted(batch["labels"])

    def specimens(self, config: Any) -> list[Sample]:
        """A few made-up samples of unequal size, as `encode` gives them for a model of `config`.

        The model is held against transformers on them before a run starts.
        """
        return token_specimens(config, num_labels=int(getattr(config, "num_labels", 2)))

    def user_call(self, batch: Batch) -> dict[str, Tensor]:
        """What a user of transformers would call the model with, for a batch of rows of one sample.

        `batch`: tensors of this task's fields. The model's loss is then the mean over targets.
        """
        seen = (batch["document_ids"] >= 0).long()
        ids = batch["input_ids"]
        return {"input_ids": ids, "attention_mask": seen, "labels": batch["labels"]}

    def examined(self) -> Task:
        """The task whose loss transformers has for this one's model: itself, unless it has none."""
        return self

    def user_losses(self, made: Any, batch: Batch, *, evaluated: bool = False) -> tuple[float, int]:
        """(sum of losses, targets) of what transformers made of `user_call`, in plain torch.

        `evaluated`: of what an evaluation counts, where that is not what is learned.
        """
        from torch.nn.functional import cross_entropy

        from shoal.models.anatomy import logits_in

        labels = batch["labels"].flatten()
        logits, number = logits_in(made).double().flatten(0, -2), counted(labels)
        if len(logits) == len(labels) and not labels.is_floating_point():
            # not transformers' own sum: of a row that was cut the last label is not in it
            total = cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            return float(total), number
        return (float(made.loss.double()) * number if number else 0.0), number

    def seen(self, model: nn.Module, batch: Batch, *, step: int) -> dict[str, Tensor]:
        """Of a task that `compares`: what the losses of other samples read of these, [B, ...] each.

        Called once a step before `output`, without gradients, in training mode.
        """
        raise NotImplementedError(f"{self.kind}: compares no samples")

    def compared(self, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fields of batches of the step [G, ...], from what was seen of its G samples [G, ...].

        The same on every rank that steps together; rows that nobody computed are 0.
        """
        raise NotImplementedError(f"{self.kind}: compares no samples")

    @abstractmethod
    def output(self, model: nn.Module, anatomy: Anatomy, batch: Batch, *, step: int = 0) -> Output:
        """Run the model on a batch. `step` keys the dropout."""

    @abstractmethod
    def metrics(self) -> Metrics:
        """A fresh accumulator for one evaluation."""

    def metrics_on(self, data: Evaluated) -> Metrics:
        """The same, where scores need something of the training part too."""
        return self.metrics()

    def baseline(self, data: Evaluated) -> Named:
        """Scores of the simplest thing one would do instead, on the same samples."""
        return {}

    @abstractmethod
    def words(self, before: Named | None, after: Named) -> list[str]:
        """The last words on a run: its scores before and after, the baseline's beside.

        `after` has the baseline's scores too; `before` is None where nothing was scored before.
        """

    def draw(self, shown: Mapping[str, Any], path: Path) -> None:
        """Draw what the last evaluation came to (`Pictured.shown`) into `path`, with matplotlib.

        Called in the process that starts the run, which has no torch.
        """
        raise NotImplementedError(f"{self.kind}: has no picture")

    def prompts(self) -> tuple[Sequence[str], int]:
        """Texts to complete at every evaluation, and how many tokens for each."""
        return (), 0

    def files(self) -> dict[str, str]:
        """Text files by name that belong into an exported model's folder."""
        return {}

    def next_command(self, *, run: str, recipe: str) -> str:
        """What one would do with the trained model next."""
        return f"shoal evaluate {run} {recipe}"


def token_specimens(config: Any, *, num_labels: int | None = None) -> list[Sample]:
    """Rows of 9 to 16 tokens, none of them special; with a label for each where `num_labels`.

    No padding is longer than the window of a small model: transformers would have no number for it.
    """
    special: set[int | None] = set()
    for name in ("pad", "bos", "eos", "sep", "mask"):
        ids = getattr(config, f"{name}_token_id", None)
        special.update(ids if isinstance(ids, list) else [ids])
    draw = np.random.default_rng(0)
    plain = [each for each in range(min(config.vocab_size, 4096)) if each not in special]
    samples: list[Sample] = []
    most = min(16, getattr(config, "max_position_embeddings", None) or 16)
    least = most + 1 - min(8, getattr(config, "sliding_window", None) or 8, most)
    for length in (max(least, most - less) for less in (5, 0, 7, 3, 6)):
        sample: Sample = {"input_ids": draw.choice(plain, size=length)}
        if num_labels is not None:
            sample["labels"] = draw.integers(num_labels, size=length)
        samples.append(sample)
    return samples


def labels_of(config: Mapping[str, Any]) -> list[str]:
    """The names of a model's labels by id, as its config.json says; empty where it does not."""
    given = config.get("id2label")
    by_id = {str(key): name for key, name in given.items()} if isinstance(given, dict) else {}
    named = [by_id.get(str(number)) for number in range(len(by_id))]
    found = [name for name in dict.fromkeys(named) if isinstance(name, str)]
    return found if len(found) == len(by_id) else []


def counted(labels: Any) -> int:
    """Labels that are targets, in an array or tensor."""
    return int((labels != IGNORED).sum())


def real_rows(batch: Batch) -> NDArray[np.bool_]:
    """Which rows of a batch are samples, and do not only fill it [B]."""
    samples = batch.get("sample_ids")
    return (
        np.ones(len(batch["labels"]), dtype=bool) if samples is None else np.asarray(samples) >= 0
    )


def was(before: Named | None, name: str, digits: int) -> str:
    """`0.103 before, `: how last words begin; nothing where nothing was scored before."""
    return f"{before[name]:.{digits}f} before, " if before and name in before else ""
