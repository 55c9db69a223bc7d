"""Parts of the section of the policy `server`: when pushes count, and how they are applied."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shoal.config.section import Count, Fraction, Rate, Section


class Asynchronous(Section):
    """Every push is applied as it comes; nobody waits for anybody."""

    kind: Literal["asynchronous"] = "asynchronous"


class Bounded(Section):
    """Stale-synchronous parallel (Ho et al., NeurIPS 2013): a bound on what a step may lack."""

    kind: Literal["bounded"] = "bounded"
    staleness: Annotated[int, Field(ge=0)] = 1
    """Steps before its own whose updates a replica may begin without; 0: none, synchronous."""


class Quorum(Section):
    """Rounds that end when enough replicas have pushed, as in decoupled DiLoCo."""

    kind: Literal["quorum"] = "quorum"
    least: Count
    """Replicas without whose push no round ends."""
    grace_seconds: Annotated[float, Field(ge=0.0)] = 0.5
    """Time that a round stays open for the others once so many have pushed."""


ConsistencySection = Annotated[Asynchronous | Bounded | Quorum, Field(discriminator="kind")]


class AsTrained(Section):
    """`train.optimizer` itself, at the server."""

    kind: Literal["train"] = "train"


class ServerSGD(Section):
    """Stochastic gradient descent; of deltas with rate 1 it is their mean."""

    kind: Literal["sgd"] = "sgd"
    learning_rate: Rate = 1.0
    """At the schedule's peak, which counts for gradients only."""
    momentum: Fraction = 0.0
    """0: none."""
    nesterov: bool = False
    """Look ahead by the momentum."""


class ServerAdam(Section):
    """Adam at the server; of deltas as in Reddi et al. (https://arxiv.org/abs/2003.00295)."""

    kind: Literal["adam"] = "adam"
    learning_rate: Rate = 1e-3
    """At the schedule's peak, which counts for gradients only."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.99
    """Decay of the second moment."""
    epsilon: Rate = 1e-8
    """Added to the square root of the second moment."""


class DelayedNesterov(Section):
    """Momentum that moves once for each replica's push (https://arxiv.org/abs/2401.09135)."""

    kind: Literal["delayed-nesterov"] = "delayed-nesterov"
    learning_rate: Rate = 0.7
    """At the schedule's peak, which counts for gradients only."""
    momentum: Fraction = 0.9
    """Decay of the momentum."""


ServerOptimizerSection = Annotated[
    AsTrained | ServerSGD | ServerAdam | DelayedNesterov, Field(discriminator="kind")
]
