"""The frozen, typed description of a run. Data only: nothing here opens a file or builds an object.

Every section is a pydantic model that refuses unknown keys. Alternatives are unions told apart by
`kind`. `None` has one stated meaning per field; there are no sentinel numbers.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from shoal.config.link import Link
from shoal.config.optimizers import AdamW, Cosine, OptimizerSection, ScheduleSection
from shoal.config.section import Auto, Count, Rate, Section
from shoal.config.sync import EveryStep, SyncSection
from shoal.config.tasks import AnyTask, CausalLM

_URL = re.compile(r"(file:///|(?!file:)[a-z][a-z0-9+.:-]*://)\S+")
"""Of a folder from the root: workers work elsewhere."""

# --- model --------------------------------------------------------------------------------------


class Adapter(Section):
    """Train small matrices beside frozen weights: of LoRA (https://arxiv.org/abs/2106.09685), or of
    DoRA, which trains each row's length too (https://arxiv.org/abs/2402.09353)."""

    kind: Literal["lora", "dora"] = "lora"
    """dora: each row's length is trained too."""
    rank: Count = 8
    """Of the product B x A that is added to each matrix."""
    alpha: Annotated[float, Field(gt=0.0)] | None = None
    """The product is multiplied by alpha / rank; None: twice the rank."""
    targets: tuple[str, ...] = ("all-linear",)
    """Layers by the end of their name or by pattern, such as q_proj; all-linear: all in blocks."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Of what goes into A."""
    base: Literal["float32", "int8", "nf4"] = "float32"
    """What the frozen matrices beside them are kept in, made float for each product: int8 (a scale
    a row), a quarter of the memory; nf4 (QLoRA's 16 levels, a scale for 64 inputs), a seventh. The
    model that is written has them as rounded."""
    path: str | None = None
    """A folder in peft's format to begin with: its rank, alpha, targets and kind are taken."""

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank


class ConfiguredModel(BaseModel):
    """A model from a configuration: `architecture` and the keys of its transformers config."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    kind: Literal["config"] = "config"
    architecture: str
    """A model_type of transformers, such as llama, gpt2, bert or vit."""
    dropout: Literal["off", "keyed", "framework"] = "keyed"
    """keyed: the same in every layout; framework: torch's own; off: none."""
    balance: Literal["sequence", "batch", "off"] = "sequence"
    """The balance loss of experts, where the model's configuration has output_router_logits: over
    each row, the same in every layout; over a micro batch as transformers has it; or none."""
    adapter: Adapter | None = None
    """Trained instead of the weights, which stay as they were drawn; None: the weights."""

    @property
    def settings(self) -> dict[str, Any]:
        """The keys meant for the transformers config class, checked where the model is built."""
        return dict(self.model_extra or {})


class PretrainedModel(Section):
    """A model from existing weights: a folder, a registry name, or a hub id."""

    kind: Literal["pretrained"] = "pretrained"
    path: str
    """A folder, a name of `shoal data list`, or owner/name of the hub."""
    dropout: Literal["off", "keyed", "framework"] = "keyed"
    """keyed: the same in every layout; framework: torch's own; off: none."""
    balance: Literal["sequence", "batch", "off"] = "sequence"
    """The balance loss of experts, where the model's configuration has output_router_logits: over
    each row, the same in every layout; over a micro batch as transformers has it; or none."""
    adapter: Adapter | None = None
    """Trained instead of the weights; None: the weights."""


ModelSection = Annotated[ConfiguredModel | PretrainedModel, Field(discriminator="kind")]

# --- data ---------------------------------------------------------------------------------------


class Source(Section):
    """One source of a mixture."""

    source: str
    """A registry name, a local file, a hub id."""
    weight: Rate = 1.0
    """Rows of this source in proportion to the others' weights."""
    text_field: str | None = None
    """As for a single source."""


class Tokenizer(Section):
    """Where token ids come from."""

    kind: Literal["auto", "train", "model", "folder"] = "auto"
    """auto: the pretrained model's own; trained on the corpus for a configured model."""
    vocabulary_size: Annotated[int, Field(ge=260)] = 4096
    """Size when trained (byte-level BPE)."""
    path: str | None = None
    """Folder with tokenizer.json, for `folder`."""

    @model_validator(mode="after")
    def _folder_needs_path(self) -> Tokenizer:
        if (self.kind == "folder") != (self.path is not None):
            raise ValueError("`path` goes with kind: folder, and only with it")
        return self


class Validation(Section):
    """What is kept apart for evaluations: one of these."""

    fraction: Annotated[float, Field(gt=0.0, le=0.5)] | None = None
    """Of the documents of every source, chosen by what they hold."""
    source: str | tuple[str, ...] | None = None
    """All of another source, as `data.source` names one, or of several."""
    split: str | None = None
    """A split of every source that is a folder or a data set of the hub, such as `validation`;
    trained on is then the split `train`."""

    @model_validator(mode="after")
    def _one_way(self) -> Validation:
        if (self.fraction, self.source, self.split).count(None) != 2:
            raise ValueError("give exactly one of `fraction`, `source` and `split`")
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """Other sources, also when one is given by name."""
        return (self.source,) if isinstance(self.source, str) else self.source or ()


class DataSection(Section):
    """What is read, and how it becomes samples."""

    source: str | tuple[Source, ...]
    """A registry name, a local file, a hub id; or a weighted mixture of them."""
    text_field: str | None = None
    """Column that holds the text; None: `text`, or the only text column."""
    sequence_tokens: Annotated[int, Field(ge=8)] = 256
    """Tokens of a row; a longer document goes on in the next row (without packing it is cut)."""
    packing: bool = True
    """Fill rows with several documents (attention never crosses from one to another)."""
    max_samples: Count | None = None
    """Documents or records of each source that are used, the first ones; None: all."""
    validation: Validation = Validation(fraction=0.02)
    """What is kept apart for evaluations; a way that is given takes the place of the other."""
    evaluation_samples: Count | None = 128
    """Validation samples used at an evaluation; None: all of them."""
    tokenizer: Tokenizer = Tokenizer()
    """Where token ids come from."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """The mixture, also when one source is given by name."""
        if isinstance(self.source, str):
            return (Source(source=self.source, text_field=self.text_field),)
        return self.source


# --- train --------------------------------------------------------------------------------------


class Until(Section):
    """When a run may end before its last step, judged at each evaluation."""

    evaluation_loss: float | None = None
    """End once the evaluation loss is at most this; None: never."""
    patience: Count | None = None
    """End after so many evaluations in a row that were no better than the best; None: never."""


class OnGrid(Section):
    """Training that sees the rounded weights which `shoal compress` will write (quantisation-aware
    training, https://arxiv.org/abs/1712.05877)."""

    bits: Literal[4, 8] = 4
    """Of a weight."""
    group: Count | None = None
    """Inputs that share a scale; None: all of a row."""
    half: bool = False
    """Scales have 16 bits, as in GGUF files."""
    keep: tuple[str, ...] = ()
    """Layers that are not rounded, by parts of their names."""


class TrainSection(Section):
    """How long, with which batch, and how the weights move."""

    steps: Count | None = None
    """Optimizer steps; or give `epochs`."""
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    """Passes over the training data; or give `steps`."""
    stop_after_steps: Count | None = None
    """End early, resumable, without changing the schedule."""
    until: Until | None = None
    """End early, done, when this is reached; None: after the last step only."""
    on_divergence: Literal["stop", "warn", "ignore"] = "stop"
    """What follows when the loss stays above its start (the highest of the first five steps, at
    most 1.5 times the first) or is not finite: stop, without a save, exit status 1; or say so."""
    divergence_steps: Count = 50
    """For so many steps in a row."""
    exact: bool = False
    """The same bits in any replicate degree and kind of worker (slower)."""
    global_batch_samples: Count = 32
    """Samples of one optimizer step, all workers together."""
    micro_batch_samples: Count | Auto = "auto"
    """Samples of one forward and backward; it changes speed and memory, not what is learned."""
    max_gradient_norm: Rate | None = 1.0
    """Gradients with a larger norm over the whole model are scaled down to it; None: never."""
    evaluate_every_steps: Annotated[int, Field(ge=0)] = 100
    """Also before the first step and after the last; 0: never."""
    optimizer: OptimizerSection = AdamW()
    """How the weights move."""
    schedule: ScheduleSection = Cosine()
    """How the learning rate changes over the steps."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are: shell patterns over canonical names."""
    keep_zeros: bool = False
    """Weights of matrices that are zero at the start stay so, as of a model that was pruned."""
    quantise: OnGrid | None = None
    """Linear layers of the blocks compute with rounded weights; None: with the weights."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of `steps` and `epochs` (null takes one away)")
        if (
            self.micro_batch_samples != "auto"
            and self.global_batch_samples % self.micro_batch_samples
        ):
            near = range(min(self.micro_batch_samples, self.global_batch_samples), 0, -1)
            divisor = next(n for n in near if self.global_batch_samples % n == 0)
            raise ValueError(
                f"micro_batch_samples {self.micro_batch_samples} does not divide "
                f"global_batch_samples {self.global_batch_samples}; {divisor} does"
            )
        return self

    def num_steps(self, *, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None, "checked when the recipe was read"
        return max(1, round(self.epochs * steps_per_epoch))


# --- parallel, sync, the rest -------------------------------------------------------------------


class Elastic(Section):
    """A degree that may shrink while workers are replaced, and grow again."""

    min: Count
    """Fewest replicas that go on while others are replaced."""
    max: Count
    """Replicas to start with."""

    @model_validator(mode="after")
    def _ordered(self) -> Elastic:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}; exchange them")
        return self


class Shard(Section):
    """The shard axis with its own settings."""

    degree: Count
    """Workers over which a replica is sharded."""
    level: Literal["parameters", "gradients", "optimizer"] = "parameters"
    """What is cut: all of it; all but parameters from forward to backward; or gradients and
    optimizer state between steps only (docs/guide/layouts.md has the memory of each)."""
    offload: bool = False
    """Keep what is cut in CPU memory, and compute on the device."""


class Context(Section):
    """The context axis with its own settings."""

    degree: Count
    """Workers over which each row is divided."""
    kind: Literal["ring", "ulysses"] = "ring"
    """How attention finds the tokens of others: keys and values go round, or tokens are swapped
    for heads, which the degree must divide."""


class Pipeline(Section):
    """The pipeline axis with its own settings."""

    degree: Count
    """Workers over which the blocks of a replica are divided."""
    schedule: Literal[
        "gpipe", "1f1b", "interleaved-1f1b", "interleaved-zero-bubble", "zbv-zero-bubble"
    ] = "1f1b"
    """In which order stages compute their micro batches (docs/design/pipeline.md)."""
    stages_per_rank: Count | None = None
    """One with gpipe and 1f1b, two with zbv-zero-bubble, else two where nothing is said."""
    split: tuple[Count, ...] | None = None
    """Blocks of each stage, first to last; left out, stages get equal work."""

    @property
    def stages(self) -> int:
        """Stages of each rank, whether said or not."""
        return self.stages_per_rank or (1 if self.schedule in ("gpipe", "1f1b") else 2)


class ParallelSection(Section):
    """Degrees of the axes. With `auto`, an axis without a value is chosen for this machine."""

    auto: bool = False
    """Choose what is left open for this machine (`parallel: auto` for short)."""
    replicate: Count | Elastic | None = None
    """A fixed degree waits for a lost replica to be replaced; an elastic one goes on without."""
    shard: Count | Shard | None = None
    """A degree, or a section with the level and offload as well."""
    context: Count | Context | None = None
    """Rows cut along the sequence: a degree, or a section with the kind as well."""
    tensor: Count | None = None
    """Heads, feed-forward widths and the vocabulary cut over so many workers."""
    pipeline: Count | Pipeline | None = None
    """Blocks divided into stages; a degree, or a section with the schedule and the split."""
    expert: Count | None = None
    """Experts of each block divided among so many ranks of shard x context; no factor of the
    workers."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Compute activations of a block again in the backward, instead of keeping them. With `auto`
    on GPUs, `none` leaves it to the plan."""
    compile: bool = False
    """Compile each block (torch.compile); needs a C++ compiler on a CPU."""

    @property
    def sharding(self) -> Shard:
        """The shard axis with its settings, whichever way it was written."""
        return self.shard if isinstance(self.shard, Shard) else Shard(degree=self.shard or 1)

    @property
    def rows(self) -> Context:
        """The context axis with its settings, whichever way it was written."""
        given = self.context
        return given if isinstance(given, Context) else Context(degree=given or 1)

    @property
    def pipelining(self) -> Pipeline:
        """The pipeline axis with its settings, whichever way it was written."""
        given = self.pipeline
        return given if isinstance(given, Pipeline) else Pipeline(degree=given or 1)

    @property
    def replicas(self) -> int | None:
        """The degree of `replicate` to start with."""
        return self.replicate.max if isinstance(self.replicate, Elastic) else self.replicate

    @property
    def fewest_replicas(self) -> int | None:
        """The degree to which `replicate` may shrink; None where it is fixed."""
        return self.replicate.min if isinstance(self.replicate, Elastic) else None


class PrecisionSection(Section):
    """Number formats. Weights and optimizer state are always kept in float32."""

    compute: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of matrix products; auto: bfloat16 where it was measured clearly faster, else float32."""
    reduce: Literal["float32"] = "float32"
    """Of gradients while they are summed."""


class CheckpointSection(Section):
    """When state is saved, and how many saves are kept."""

    every_steps: Annotated[int, Field(ge=0)] = 100
    """0: only at the end, when stopped, and as `keep_best` says."""
    keep: Count = 2
    """Newest checkpoints that are kept; older ones are deleted."""
    keep_best: bool = True
    """Save after the evaluation with the lowest loss so far, and keep that save as well."""
    model: Literal["last", "best"] = "last"
    """What RUN/model is written from: the end of the run, or the best save (`keep_best`)."""
    where: str = "shared"
    """shared: the run directory is on storage that all hosts see. local: each host saves on its
    own disk, and any one of them may be lost (hosts without shared storage). A URL such as
    s3://BUCKET/PREFIX: an object store."""
    background: bool = True
    """Copy the state and write it while the steps go on; the last save is always waited for."""

    @field_validator("where")
    @classmethod
    def _is_a_place(cls, text: str) -> str:
        if text in ("shared", "local") or _URL.fullmatch(text):
            return text
        raise ValueError("expected shared, local, or a URL such as s3://bucket/prefix")


class LaunchSection(Section):
    """What a worker is, and how many threads it computes with."""

    workers: Literal["auto", "threads", "processes"] = "auto"
    """What a replica of one worker is: a process, or a thread that shares the parameters."""
    threads_per_worker: Count | Auto = "auto"
    """CPU cores that one worker computes with."""
    tune: bool = True
    """Time the ways to use this machine's cores that the recipe leaves open; False: by rule."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Failures at one and the same step that are recovered from; 0: a failure ends the run."""
    silence_seconds: Rate = 1.5
    """A worker that gives no sign for this long, and three times as long as it lately took for
    the same thing, is taken for stuck."""
    time_limit_seconds: Rate | None = None
    """Save and stop, resumable, after this time; None: no limit."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPUs where there are any, else the CPU."""
    link: str | None = None
    """Let replicas, which are processes of this machine, talk over a slower link, to try one: a
    rate and a delay, such as 20Mbit/s,10ms. None: as fast as it goes."""

    @field_validator("link")
    @classmethod
    def _reads_as_link(cls, text: str | None) -> str | None:
        if text is not None:
            Link.parse(text)
        return text


class WandB(Section):
    """Where the run stands at Weights & Biases; a resumed run goes on as the same one."""

    project: str = "shoal"
    """Project that it belongs to."""
    entity: str | None = None
    """User or team; None: the one of the key."""
    name: str | None = None
    """Name of the run; None: that of the run directory."""
    group: str | None = None
    """Group of runs that are shown together."""
    tags: tuple[str, ...] = ()
    """Words to find it by."""


class ObserveSection(Section):
    """Where numbers go."""

    log_every_steps: Count = 1
    """A row of metrics.jsonl every so many steps."""
    console: bool = True
    """Show progress."""
    tensorboard: bool = False
    """Also to RUN/tensorboard."""
    wandb: bool | WandB = False
    """Also to Weights & Biases; a section says where there."""
    trace: bool = False
    """Write RUN/trace.json, for chrome://tracing or Perfetto."""


class Recipe(Section):
    """A whole run."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides weights, order of the data and dropout."""
    task: AnyTask = CausalLM()
    """What is learned."""
    model: ModelSection
    """What learns."""
    data: DataSection
    """What is read, and how it becomes samples."""
    train: TrainSection
    """How long, with which batch, and how the weights move."""
    parallel: ParallelSection = ParallelSection(auto=True)
    """How the model and the batch are divided."""
    sync: SyncSection = EveryStep()
    """How replicas agree."""
    precision: PrecisionSection = PrecisionSection()
    """Number formats."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When state is saved."""
    launch: LaunchSection = LaunchSection()
    """What a worker is."""
    observe: ObserveSection = ObserveSection()
    """Where numbers go."""
