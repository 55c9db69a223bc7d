"""What workers and a parameter server say to each other: bodies of comm/requests.py."""

from __future__ import annotations

from typing import Annotated

import msgspec

from shoal.comm.wire import Count

Facts = Annotated[str, msgspec.Meta(max_length=1 << 19)]
"""JSON of a worker, which only workers read."""


Read = tuple[int, int, int]
"""A step, counted from 0, the digest of samples that were read for it, and their number."""
Reads = Annotated[tuple[Read, ...], msgspec.Meta(max_length=1 << 16)]


class _Message(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag=True):
    """`position`: of the worker inside its replica; each has a part of the parameters."""

    position: Count
    replica: Count
    life: Count
    """Which worker it is that speaks for the replica: one that was replaced is heard no more."""


class Region(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Elements `start` to `stop` of a part, and the weight decay of all of them."""

    start: Count
    stop: Count
    weight_decay: float


class Hello(_Message, frozen=True):
    """A worker begins to speak for its replica. Answer: Welcome."""

    numel: Count
    """Elements of this server's part."""
    regions: Annotated[tuple[Region, ...], msgspec.Meta(max_length=64)]
    dtype: Annotated[str, msgspec.Meta(pattern="^F(32|64)$")] = "F32"


class Fill(_Message, frozen=True):
    """The first state of a part: values, then the optimizer's states in their order."""

    clocks: dict[int, Count]
    """Pushes of each replica so far."""
    version: Count
    counts: dict[str, Count] = {}
    """Numbers that the optimizer counts."""
    facts: dict[int, Facts] = {}
    reads: Reads = ()


class Pull(_Message, frozen=True):
    """Asks for the parameters that the next step may begin with. Answer: Values, or NotYet."""


class Push(_Message, frozen=True):
    """A gradient (or delta) for `clock`, computed from `version`. Answer: Taken.

    Its request id is (replica, clock): a repetition is acknowledged, and not applied again.
    """

    clock: Count
    version: Count
    weight: Annotated[float, msgspec.Meta(ge=0.0)]
    """Targets it is a mean over; 0: nothing to apply, and no tensors."""
    rate: Annotated[float, msgspec.Meta(ge=0.0)]
    """Factor of the schedule on the server's learning rate."""
    facts: Facts = ""
    reads: Reads = ()


class Collect(_Message, frozen=True):
    """Asks for the whole state of the part. Answer: State, or NotYet.

    `when_done`: only once nothing follows from any other replica.
    """

    when_done: bool = False
    written_steps: Count = 0
    """Steps whose reads need not be kept any more."""


class Stop(_Message, frozen=True):
    """This worker was asked to stop. Answer: Ending, with the clock after which all stop."""


class Done(_Message, frozen=True):
    """Nothing follows from this replica. Answer: Taken."""


Request = Hello | Fill | Pull | Push | Collect | Stop | Done


class Welcome(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag=True):
    """`clock`: pushes of this replica that count; `facts`: what its last push told."""

    filled: bool
    clock: Count
    facts: Facts = ""


class Values(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag=True):
    """The part's parameters, of `version`."""

    version: Count
    stop_after: int = -1
    """Clock with which this replica's part of the run ends; -1: that of the recipe."""


class NotYet(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag=True):
    """Ask again; `why` tells what is waited for."""

    why: str


class Taken(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag=True):
    """A push is on the disk, and applied or waiting for its turn."""

    staleness: Count
    """Updates (under `bounded`: clocks) that its parameters lacked."""


class State(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag=True):
    """Values and states of a part, with what `Fill` needs."""

    clocks: dict[int, Count]
    version: Count
    counts: dict[str, Count]
    facts: dict[int, Facts]
    reads: Reads


class Ending(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag=True):
    """The clock with which this replica's part of the run ends."""

    stop_after: int


class Refused(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag=True):
    """What is wrong with the request; it changed nothing."""

    problem: str


Answer = Welcome | Values | NotYet | Taken | State | Ending | Refused
