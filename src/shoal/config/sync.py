"""How replicas agree: one section for each policy, and one for each codec that it may use."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shoal.config.section import Auto, Count, Section
from shoal.config.server import AsTrained, Bounded, ConsistencySection, ServerOptimizerSection


class NoCodec(Section):
    """Values cross the wire as they are."""

    kind: Literal["none"] = "none"
    error_feedback: Literal[False] = False
    """Nothing is lost that could be fed back."""


class EveryStep(Section):
    """Gradients of all replicas are summed at every step."""

    kind: Literal["every-step"] = "every-step"
    codec: NoCodec = NoCodec()
    """How values are compressed; today not at all."""
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
    """How values are compressed; today not at all."""
    verify_every_steps: Annotated[int, Field(ge=0)] | Auto = "auto"
    """Compare a hash of the parameters over replicas after an average; 0: never."""


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
    codec: NoCodec = NoCodec()
    """How values are compressed; today not at all."""
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


SyncSection = Annotated[EveryStep | LocalSGD | Server, Field(discriminator="kind")]
