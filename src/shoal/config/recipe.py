"""The frozen, typed description of a run. Data only: nothing here opens a file or builds an object.

Every section is a pydantic model that refuses unknown keys. Alternatives are unions told apart by
`kind`. `None` has one stated meaning per field; there are no sentinel numbers.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Rate = Annotated[float, Field(gt=0.0)]
Auto = Literal["auto"]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values cannot change after reading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


# --- task ---------------------------------------------------------------------------------------


class CausalLM(Section):
    """Predict the next token."""

    kind: Literal["causal-lm"] = "causal-lm"
    prompts: tuple[str, ...] = ()
    """Completed at every evaluation, so that progress can be read."""
    sample_tokens: Count = 48
    """Tokens generated for each prompt."""


class TokenClassification(Section):
    """Give every word a tag, such as a named entity."""

    kind: Literal["token-classification"] = "token-classification"


class ImageClassification(Section):
    """Give every image one of several classes."""

    has_tokens: ClassVar[bool] = False
    kind: Literal["image-classification"] = "image-classification"
    shift_pixels: Annotated[int, Field(ge=0)] = 0
    """While training, images are moved by up to so many pixels up or down and left or right, each
    time they are read by other ones."""


TaskSection = Annotated[
    CausalLM | TokenClassification | ImageClassification, Field(discriminator="kind")
]

# --- model --------------------------------------------------------------------------------------


class ConfiguredModel(BaseModel):
    """A model from a configuration: `architecture` and the keys of its transformers config."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    kind: Literal["config"] = "config"
    architecture: str
    dropout: Literal["off", "keyed", "framework"] = "keyed"

    @property
    def settings(self) -> dict[str, Any]:
        """The keys meant for the transformers config class, checked where the model is built."""
        return dict(self.model_extra or {})


class PretrainedModel(Section):
    """A model from existing weights: a folder, a registry name, or a hub id."""

    kind: Literal["pretrained"] = "pretrained"
    path: str
    dropout: Literal["off", "keyed", "framework"] = "keyed"


ModelSection = Annotated[ConfiguredModel | PretrainedModel, Field(discriminator="kind")]

# --- data ---------------------------------------------------------------------------------------


class Source(Section):
    """One source of a mixture."""

    source: str
    weight: Rate = 1.0
    text_field: str | None = None


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


class DataSection(Section):
    """What is read, and how it becomes samples."""

    source: str | tuple[Source, ...]
    """A registry name, a local file, a hub id; or a weighted mixture of them."""
    text_field: str | None = None
    """Column that holds the text; None: `text`, or the only text column."""
    sequence_tokens: Annotated[int, Field(ge=8)] = 256
    packing: bool = True
    """Fill rows with several documents (attention never crosses from one to another)."""
    validation_fraction: Annotated[float, Field(gt=0.0, le=0.5)] = 0.02
    evaluation_samples: Count | None = 128
    """Validation samples used at an evaluation; None: all of them."""
    tokenizer: Tokenizer = Tokenizer()

    @property
    def sources(self) -> tuple[Source, ...]:
        """The mixture, also when one source is given by name."""
        if isinstance(self.source, str):
            return (Source(source=self.source, text_field=self.text_field),)
        return self.source


# --- train --------------------------------------------------------------------------------------


class AdamW(Section):
    """Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: Rate = 1e-3
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: Rate = 1e-8


class Muon(Section):
    """Orthogonalised momentum for matrices; AdamW for the rest (torch.optim.Muon)."""

    kind: Literal["muon"] = "muon"
    learning_rate: Rate = 0.02
    """For matrices of the blocks."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    momentum: Fraction = 0.95
    adamw_learning_rate: Rate = 1e-3
    """For embeddings, head, norms and biases."""
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    epsilon: Rate = 1e-8


class Constant(Section):
    """The same rate after the warm-up."""

    kind: Literal["constant"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0


class Linear(Section):
    """A straight line from the peak to `final_fraction` of it."""

    kind: Literal["linear"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0


class Cosine(Section):
    """Half a cosine from the peak to `final_fraction` of it."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1


class WarmupStableDecay(Section):
    """Warm up, hold, then fall over the last `decay_steps` in a straight line."""

    kind: Literal["warmup-stable-decay"] = "warmup-stable-decay"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay_steps: Count = 1
    final_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0


class SGD(Section):
    """Plain stochastic gradient descent (torch.optim.SGD)."""

    kind: Literal["sgd"] = "sgd"
    learning_rate: Rate = 1.0e-1
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0


OptimizerSection = Annotated[AdamW | Muon | SGD, Field(discriminator="kind")]
ScheduleSection = Annotated[
    Constant | Linear | Cosine | WarmupStableDecay, Field(discriminator="kind")
]


class TrainSection(Section):
    """How long, with which batch, and how the weights move."""

    steps: Count | None = None
    """Optimizer steps; or give `epochs`."""
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    stop_after_steps: Count | None = None
    """End early, resumable, without changing the schedule."""
    exact: bool = False
    """The same bits in any replicate degree and kind of worker (slower)."""
    global_batch_samples: Count = 32
    micro_batch_samples: Count | Auto = "auto"
    max_gradient_norm: Rate | None = 1.0
    evaluate_every_steps: Annotated[int, Field(ge=0)] = 100
    """Also before the first step and after the last; 0: never."""
    optimizer: OptimizerSection = AdamW()
    schedule: ScheduleSection = Cosine()
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are: shell patterns over canonical names."""

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


# --- parallel, sync, the rest -------------------------------------------------------------------


class Elastic(Section):
    """A degree that may shrink while workers are replaced, and grow again."""

    min: Count
    max: Count

    @model_validator(mode="after")
    def _ordered(self) -> Elastic:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}; exchange them")
        return self


class Shard(Section):
    """The shard axis with its own settings."""

    degree: Count
    level: Literal["parameters", "gradients", "optimizer"] = "parameters"
    """What is cut: all of it; all but parameters from forward to backward; or gradients and
    optimizer state between steps only (docs/guide/layouts.md has the memory of each)."""
    offload: bool = False
    """Keep what is cut in CPU memory, and compute on the device."""


class ParallelSection(Section):
    """Degrees of the axes. With `auto`, an axis without a value is chosen for this machine."""

    auto: bool = False
    replicate: Count | Elastic | None = None
    """A fixed degree waits for a lost replica to be replaced; an elastic one goes on without."""
    shard: Count | Shard | None = None
    """A degree, or a section with the level and offload as well."""
    context: Count | None = None
    tensor: Count | None = None
    pipeline: Count | None = None
    expert: Count | None = None
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
    def replicas(self) -> int | None:
        """The degree of `replicate` to start with."""
        return self.replicate.max if isinstance(self.replicate, Elastic) else self.replicate

    @property
    def fewest_replicas(self) -> int | None:
        """The degree to which `replicate` may shrink; None where it is fixed."""
        return self.replicate.min if isinstance(self.replicate, Elastic) else None


class NoCodec(Section):
    """Values cross the wire as they are."""

    kind: Literal["none"] = "none"
    error_feedback: Literal[False] = False


class EveryStep(Section):
    """Gradients of all replicas are summed at every step."""

    kind: Literal["every-step"] = "every-step"
    codec: NoCodec = NoCodec()
    bucket_bytes: Annotated[int, Field(ge=1024)] = 128 * 2**20
    """Largest message of one reduction."""
    verify_every_steps: Annotated[int, Field(ge=0)] | Auto = "auto"
    """Compare a hash of parameters and optimizer state over replicas; 0: never; auto: before every
    step on a CPU, every 100 steps on a device, whose state must be copied for it."""


class LocalSGD(Section):
    """Replicas step by themselves and average their parameters every few steps."""

    kind: Literal["local-sgd"] = "local-sgd"
    every_steps: Count = 16
    """Steps from one average to the next; the last step of a run ends with one."""
    codec: NoCodec = NoCodec()
    verify_every_steps: Annotated[int, Field(ge=0)] | Auto = "auto"
    """Compare a hash of the parameters over replicas after an average; 0: never."""


SyncSection = Annotated[EveryStep | LocalSGD, Field(discriminator="kind")]


class PrecisionSection(Section):
    """Number formats. Weights and optimizer state are always kept in float32."""

    compute: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    reduce: Literal["float32"] = "float32"


class CheckpointSection(Section):
    """When state is saved, and how many saves are kept."""

    every_steps: Annotated[int, Field(ge=0)] = 100
    """0: only at the end and when stopped."""
    keep: Count = 2
    background: bool = True
    """Copy the state and write it while the steps go on; the last save is always waited for."""


class LaunchSection(Section):
    """What a worker is, and how many threads it computes with."""

    workers: Literal["auto", "threads", "processes"] = "auto"
    threads_per_worker: Count | Auto = "auto"
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


class ObserveSection(Section):
    """Where numbers go."""

    log_every_steps: Count = 1
    console: bool = True
    tensorboard: bool = False
    wandb: bool = False
    trace: bool = False


class Recipe(Section):
    """A whole run."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    task: TaskSection = CausalLM()
    model: ModelSection
    data: DataSection
    train: TrainSection
    parallel: ParallelSection = ParallelSection(auto=True)
    sync: SyncSection = EveryStep()
    precision: PrecisionSection = PrecisionSection()
    checkpoint: CheckpointSection = CheckpointSection()
    launch: LaunchSection = LaunchSection()
    observe: ObserveSection = ObserveSection()
