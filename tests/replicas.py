"""Replicas as threads with memory of their own, for tests of policies and codecs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shoal.comm.flat import FlatLayout
from shoal.comm.group import Group
from shoal.comm.threads import Meeting, ThreadGroup
from shoal.sync.kinds import create
from shoal.sync.policy import Division, Given, Policy

LAYOUT = FlatLayout.of(
    {
        "decay": {
            "model.embed.weight": (40, 24),
            "model.layers.0.up.weight": (64, 24),
            "model.layers.1.up.weight": (64, 24),
            "model.layers.2.up.weight": (64, 24),
            "model.layers.3.up.weight": (64, 24),
        },
        "plain": {"model.layers.0.norm.weight": (24,), "model.norm.weight": (24,)},
        "frozen": {},
    }
)
"""Matrices in four blocks, an embedding and two vectors."""


def drawn(seed: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """A flat vector of LAYOUT with normal numbers in every parameter, and zeros in between."""
    flat, draws = torch.zeros(LAYOUT.numel, dtype=dtype), torch.Generator().manual_seed(seed)
    for name, shape in LAYOUT.shapes.items():
        LAYOUT.view(flat, name).copy_(torch.randn(shape, generator=draws, dtype=dtype))
    return flat


def on_replicas(size: int, body: Callable[[int, Group], Any]) -> list[Any]:
    """What `body(rank, group)` gives on each of `size` threads; the first error of any."""
    meeting, failures, found = Meeting(size, timeout_seconds=30), list[BaseException](), {}

    def run(rank: int) -> None:
        try:
            found[rank] = body(rank, ThreadGroup(meeting, rank=rank))
        except BaseException as error:
            failures.append(error)
            meeting.fail(repr(error))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [found[rank] for rank in range(size)]


def policy_of(section: Any, group: Group, values: Tensor, *, steps: int) -> Policy:
    """The policy of `section` for `values` laid out as LAYOUT, among `group`."""
    policy = create(section, Given(Division(12, 1), values, LAYOUT, steps, seed=5))
    alone = ThreadGroup(Meeting(1, timeout_seconds=30), rank=0)
    policy.enter(world=group, peers=group, inside=alone)
    return policy
