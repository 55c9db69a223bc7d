"""The sections train.optimizer and train.schedule of a recipe: how the weights move. Data only."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from shoal.config.section import Count, Fraction, Rate, Section


class AdamW(Section):
    """Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: Rate = 1e-3
    """At the schedule's peak; with pretrained weights the default is 2e-5."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Of matrices; norms, biases and embeddings have none. With pretrained weights 0.01."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.95
    """Decay of the second moment."""
    epsilon: Rate = 1e-8
    """Added to the square root of the second moment."""


class Muon(Section):
    """Orthogonalised momentum for matrices, AdamW for the rest
    (https://kellerjordan.github.io/posts/muon/)."""

    kind: Literal["muon"] = "muon"
    learning_rate: Rate = 0.02
    """For matrices of the blocks."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Of matrices; norms, biases and embeddings have none."""
    momentum: Fraction = 0.95
    """Of the matrices."""
    adamw_learning_rate: Rate = 1e-3
    """For embeddings, head, norms and biases."""
    beta1: Fraction = 0.9
    """Of AdamW."""
    beta2: Fraction = 0.95
    """Of AdamW."""
    epsilon: Rate = 1e-8
    """Of AdamW."""


class Schedule(Section):
    """How long the rate rises."""

    kind: str
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps in which the rate rises to the peak."""
    warmup_fraction: Fraction = 0.0
    """The same as a share of the run's steps, rounded up, in place of `warmup_steps`; with
    pretrained weights 0.03 where neither is given."""

    @model_validator(mode="after")
    def _one_warmup(self) -> Schedule:
        if self.warmup_steps and self.warmup_fraction:
            raise ValueError("give `warmup_steps` or `warmup_fraction` (0 takes one away)")
        return self

    def num_warmup_steps(self, *, steps: int) -> int:
        """Steps of a run of `steps` in which the rate rises."""
        return self.warmup_steps or math.ceil(self.warmup_fraction * steps)


class Constant(Schedule):
    """The same rate after the warm-up."""

    kind: Literal["constant"] = "constant"


class Linear(Schedule):
    """A straight line from the peak to `final_fraction` of it."""

    kind: Literal["linear"] = "linear"
    final_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """The last step's rate over the peak's."""


class Cosine(Schedule):
    """Half a cosine from the peak to `final_fraction` of it."""

    kind: Literal["cosine"] = "cosine"
    final_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """The last step's rate over the peak's."""


class WarmupStableDecay(Schedule):
    """Warm up, hold, then fall over the last `decay_steps` in a straight line."""

    kind: Literal["warmup-stable-decay"] = "warmup-stable-decay"
    decay_steps: Count = 1
    """Steps in which it falls."""
    final_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """The last step's rate over the peak's."""


class SGD(Section):
    """Plain stochastic gradient descent (torch.optim.SGD)."""

    kind: Literal["sgd"] = "sgd"
    learning_rate: Rate = 1.0e-1
    """At the schedule's peak."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Of matrices; norms, biases and embeddings have none."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """0: none."""


OptimizerSection = Annotated[AdamW | Muon | SGD, Field(discriminator="kind")]
ScheduleSection = Annotated[
    Constant | Linear | Cosine | WarmupStableDecay, Field(discriminator="kind")
]
