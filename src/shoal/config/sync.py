"""How replicas agree: one section for each policy, and one for each codec that it may use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from shoal.config.section import Auto, Count, Fraction, Rate, Section
from shoal.config.server import AsTrained, Bounded, ConsistencySection, ServerOptimizerSection

Block = Annotated[int, Field(ge=8, le=65536, multiple_of=8)]
"""Values that share a scale."""


class Brake(Section):
    """When a codec is taken out because it no longer sends what matters."""

    every_rounds: Count = 100
    """Rounds from one comparison to the next; each costs a sum without the codec."""
    cosine: Annotated[float, Field(ge=-1.0, le=1.0)] = 0.2
    """Between the compressed sum and the true one; below it the codec is switched off for good."""


class Codec(Section):
    """How what replicas exchange is compressed."""

    error_feedback: bool = False
    """Add what a sum left out to the next one; costs a vector as large as the parameters."""
    brake: Brake | None = None
    """Compare with the true sum now and then; None: never."""
    after_rounds: Annotated[int, Field(ge=0)] = 0
    """First rounds whose sums cross as they are; under every-step a round is a step."""


class NoCodec(Section):
    """Values cross the wire as they are."""

    kind: Literal["none"] = "none"
    error_feedback: Literal[False] = False
    """Nothing is lost that could be fed back."""
    brake: Literal[None] = None
    """Nothing is compressed that could be switched off."""
    after_rounds: Literal[0] = 0
    """Nothing is compressed that could begin later."""


class Bfloat16(Codec):
    """The upper half of float32: 2 bytes a value."""

    kind: Literal["bf16"] = "bf16"


class Float16(Codec):
    """float16, scaled block by block so that nothing overflows: 2 bytes a value."""

    kind: Literal["fp16"] = "fp16"
    block: Block = 1024
    """Values that share a scale of 4 bytes."""


class Int8(Codec):
    """255 levels of a block's largest value: a byte a value."""

    kind: Literal["int8"] = "int8"
    block: Block = 256
    """Values that share a scale of 4 bytes."""
    stochastic: bool = False
    """Round up or down by chance, so that the mean is right; else to the nearest."""


class Int4(Codec):
    """15 levels of a block's largest value: half a byte a value."""

    kind: Literal["int4"] = "int4"
    block: Block = 128
    """Values that share a scale of 4 bytes."""
    stochastic: bool = False
    """Round up or down by chance, so that the mean is right; else to the nearest."""
    error_feedback: bool = True
    """Add what a sum left out to the next one; costs a vector as large as the parameters."""


class Sign(Codec):
    """A bit a value, and the mean magnitude of each block."""

    kind: Literal["sign"] = "sign"
    block: Block = 256
    """Values that share a scale of 4 bytes."""
    error_feedback: bool = True
    """Add what a sum left out to the next one; without it this does not learn."""


class TopK(Codec):
    """The largest values alone, as pairs of index and value: 8 bytes each, in blocks 3 or 1."""

    kind: Literal["topk"] = "topk"
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.01
    """Of the values of this rank."""
    block: Literal[16, 64, 128, 256] | None = None
    """Choose the largest of each so many values: a byte says where, and the value is bfloat16; of
    16, place and value share a byte. None: the largest of all, with four bytes each."""
    error_feedback: bool = True
    """Add what a sum left out to the next one; without it this does not learn."""


class PowerSGD(Codec):
    """Of each matrix a product of two thin ones; what is no matrix crosses as it is."""

    kind: Literal["powersgd"] = "powersgd"
    rank: Count = 4
    """Columns of the thin matrices."""
    error_feedback: bool = True
    """Add what a sum left out to the next one; without it this does not learn."""


CodecSection = Annotated[
    NoCodec | Bfloat16 | Float16 | Int8 | Int4 | Sign | TopK | PowerSGD, Field(discriminator="kind")
]


MessageCodec = Annotated[
    NoCodec | Bfloat16 | Float16 | Int8 | Int4 | Sign, Field(discriminator="kind")
]
"""Those that turn values into one message, without sums in between."""


class _Divided(Section):
    """What policies have whose replicas divide batches among them."""

    shares: Literal["equal", "measured"] = "equal"
    """Of every batch, for each replica. measured: by speed, in whole micro batches; replicas that
    step by themselves take fewer steps where they are slow, and count by what they trained on."""


class EveryStep(_Divided):
    """Gradients of all replicas are summed at every step."""

    kind: Literal["every-step"] = "every-step"
    codec: CodecSection = NoCodec()
    """How gradients are compressed."""
    bucket_bytes: Annotated[int, Field(ge=1024)] = 128 * 2**20
    """Largest message of one reduction without a codec."""
    group_replicas: Annotated[int, Field(ge=2)] | None = None
    """Neighbouring replicas, such as those of one host, that sum among themselves first, so that
    each sends only its part to the other groups; null: all at once. With train.exact the bits are
    the same."""
    verify_every_steps: Annotated[int, Field(ge=0)] | Auto = "auto"
    """Compare a hash of parameters and optimizer state over replicas; 0: never; auto: before every
    step on a CPU, every 100 steps on a device, whose state must be copied for it."""

    @model_validator(mode="after")
    def _two_levels(self) -> EveryStep:
        if self.group_replicas is not None and self.codec.kind != "none":
            raise ValueError("`group_replicas` sums floats: leave it out, or set codec to none")
        return self


class LocalSGD(_Divided):
    """Replicas step by themselves and average their parameters every few steps."""

    kind: Literal["local-sgd"] = "local-sgd"
    every_steps: Count | Literal["end"] = 16
    """Steps from one average to the next; the last step of a run ends with one. end: only that."""
    start_steps: Annotated[int, Field(ge=0)] = 0
    """First steps that all take together, as under every-step."""
    group_replicas: Annotated[int, Field(ge=2)] | None = None
    """Neighbouring replicas that average among themselves every `every_steps`, such as those of one
    host; None: all do. The numbers of replicas are those of their workers, in order."""
    outer_every_steps: Count | None = None
    """Steps from one average over all groups to the next; a multiple of `every_steps`."""
    codec: NoCodec = NoCodec()
    """Parameters are averaged as they are; DiLoCo compresses what they moved by."""
    verify_every_steps: Annotated[int, Field(ge=0)] | Auto = "auto"
    """Compare a hash of the parameters over replicas after an average of all; 0: never."""

    @model_validator(mode="after")
    def _two_levels(self) -> LocalSGD:
        if (self.group_replicas is None) != (self.outer_every_steps is None):
            raise ValueError("`group_replicas` and `outer_every_steps` go together: set both")
        outer, every = self.outer_every_steps, self.every_steps
        if outer is not None and (every == "end" or outer % every or outer == every):
            raise ValueError(
                f"`outer_every_steps` is a multiple of `every_steps`, above it; got {outer} and "
                f"{every}"
            )
        return self


class _DiLoCo(_Divided):
    """What both kinds of DiLoCo have."""

    every_steps: Count = 30
    """Steps from one round to the next; the last step of a run ends with one."""
    start_steps: Annotated[int, Field(ge=0)] = 0
    """First steps that all take together, as under every-step: a tenth of the run is usual."""
    outer_learning_rate: Rate = 0.7
    """Of the step on what replicas have moved by; 1 without momentum is a plain average of them."""
    outer_momentum: Fraction = 0.9
    """0: none."""
    nesterov: bool = True
    """Look ahead along the momentum."""
    verify_every_steps: Annotated[int, Field(ge=0)] | Auto = "auto"
    """Compare a hash of parameters and outer state over replicas after a round; 0: never."""


class DiLoCo(_DiLoCo):
    """Replicas step by themselves; every few steps one outer step follows what they moved by."""

    kind: Literal["diloco"] = "diloco"
    codec: CodecSection = NoCodec()
    """How the outer gradient is compressed."""


class StreamingDiLoCo(_DiLoCo):
    """DiLoCo piece by piece: fragments of the model meet in turn, while steps go on."""

    kind: Literal["streaming-diloco"] = "streaming-diloco"
    fragments: Annotated[int, Field(ge=1)] = 2
    """Parts of whole blocks, strided; each meets once every `every_steps`."""
    overlap_steps: Annotated[int, Field(ge=0)] = 1
    """Steps that go on while a fragment is on its way; 0: wait for it."""
    own_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Of a replica's own parameters in what follows a meeting; the rest is the agreed ones."""
    codec: MessageCodec = NoCodec()
    """How outer gradients are compressed: one that needs a single message."""


class Gossip(Section):
    """Replicas step by themselves, and average with neighbours only."""

    kind: Literal["gossip"] = "gossip"
    every_steps: Count = 1
    """Steps from one exchange to the next."""
    graph: Literal["ring", "exponential"] = "exponential"
    """ring: with both neighbours; exponential: with the one that is 1, 2, 4, ... ranks away in
    turn."""
    meet_every_steps: Count = 50
    """Steps from one meeting of all to the next, where the distance between replicas is measured,
    and stops and saves on request are agreed. The last step of a run ends with an average."""
    codec: NoCodec = NoCodec()
    """Parameters are exchanged as they are."""
    verify_every_steps: Annotated[int, Field(ge=0)] | Auto = "auto"
    """Compare a hash of the parameters over replicas after the last average; 0: never."""


class Hogwild(Section):
    """Threads step on one copy of the parameters, without locks."""

    kind: Literal["hogwild"] = "hogwild"
    meet_every_steps: Count = 50
    """Steps from one meeting of all threads to the next, where stops and saves on request are
    agreed; they also meet to evaluate and save."""
    codec: NoCodec = NoCodec()
    """Nothing crosses a wire."""
    verify_every_steps: Literal[0] = 0
    """There is one copy, with which nothing could be compared."""


class Server(Section):
    """Replicas push to a parameter server and pull from it; they never wait for one another but as
    `consistency` says."""

    kind: Literal["server"] = "server"
    consistency: ConsistencySection = Bounded()
    """When a push counts, and what a replica may begin a step with."""
    servers: Count = 1
    """Server processes; each holds an equal part of the parameters."""
    push: Literal["gradients", "deltas"] = "gradients"
    """gradients: the server has the only optimizer; deltas: each replica trains by itself with
    train.optimizer, and the server takes the change of its parameters for a gradient."""
    every_steps: Count = 1
    """Steps from one push to the next, for deltas; the last step of a run ends with one."""
    optimizer: ServerOptimizerSection = AsTrained()
    """What the server does with a push."""
    staleness_aware: bool = False
    """Divide the weight of a push by its staleness (https://arxiv.org/abs/1511.05950)."""
    delay_compensation: Annotated[float, Field(ge=0.0)] = 0.0
    """Correct a gradient g, computed at w, by this times g*g*(w now - w)
    (https://arxiv.org/abs/1609.08326); 0: not at all."""
    durable: bool = True
    """A push is on the server's disk before it is acknowledged, so that a server that dies loses
    nothing; False: such a run goes back to its last checkpoint."""
    replay: str | None = None
    """A run directory: pushes and pulls happen in the order recorded there; None: as they come."""
    codec: MessageCodec = NoCodec()
    """How pushes are compressed: one that needs a single message. Pulls are not."""
    verify_every_steps: Literal[0] = 0
    """There is one copy, with which nothing could be compared."""

    @model_validator(mode="after")
    def _what_is_pushed(self) -> Server:
        if self.push == "gradients" and self.every_steps > 1:
            raise ValueError("`every_steps` above 1 needs `push: deltas`")
        if self.push == "deltas" and self.optimizer.kind == "train":
            raise ValueError(
                "`push: deltas` runs train.optimizer in the replicas, and needs another at the "
                "server: set `optimizer` to {kind: sgd}, which averages, or to delayed-nesterov"
            )
        if self.push == "deltas" and self.delay_compensation:
            raise ValueError("`delay_compensation` is of gradients: set `push: gradients`, or 0")
        return self


SyncSection = Annotated[
    EveryStep | LocalSGD | DiLoCo | StreamingDiLoCo | Gossip | Server | Hogwild,
    Field(discriminator="kind"),
]


def is_same(saved: Mapping[str, Any], section: SyncSection) -> bool:
    """Whether a policy can go on from the state of one with the section `saved` (as JSON)."""
    aside = {"verify_every_steps", "bucket_bytes", "shares"}
    wanted = section.model_dump(mode="json", exclude=aside)
    return {key: value for key, value in saved.items() if key not in aside} == wanted
