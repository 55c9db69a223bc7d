"""How replicas agree: one section for each policy, and one for each codec that it may use."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shoal.config.section import Auto, Count, Section


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


SyncSection = Annotated[EveryStep | LocalSGD, Field(discriminator="kind")]
