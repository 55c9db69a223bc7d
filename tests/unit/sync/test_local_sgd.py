"""Policy local-sgd: a round is the weighted mean, and a lost peer's round is made up for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import replicas
from shoal.comm.flat import CHUNK, FlatLayout
from shoal.comm.group import Group
from shoal.comm.threads import Meeting, ThreadGroup
from shoal.errors import WorkerError
from shoal.sync.local_sgd import LocalSGD
from shoal.sync.policy import Division, Gradients

LAYOUT = FlatLayout.of({"decay": {"a": (2, CHUNK)}, "frozen": {}})


def values(rank: int) -> torch.Tensor:
    return torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(rank))


def on_replicas(size: int, body: Callable[[int, LocalSGD, torch.Tensor], object]) -> None:
    """`body(rank, policy, parameters)` on each of `size` replicas with memory of its own."""

    def run(rank: int, group: Group) -> None:
        own, alone = values(rank), ThreadGroup(Meeting(1, timeout_seconds=20), rank=0)
        policy = LocalSGD(Division(12, 1), values=own, every_steps=4, steps=10)
        policy.enter(world=group, peers=group, inside=alone)
        assert policy.together is alone
        body(rank, policy, own)

    replicas.on_replicas(size, run)


def test_a_round_is_the_mean_weighted_by_targets() -> None:
    targets = [10, 30, 60]
    wanted = sum(values(rank) * count / 100 for rank, count in enumerate(targets))

    def body(rank: int, policy: LocalSGD, own: torch.Tensor) -> None:
        for step in range(3):
            policy.before_step(step)
            policy.after_step(step, targets=targets[rank])
            assert torch.equal(own, values(rank)), "replicas step by themselves"
            assert not policy.equal_after(step + 1)
        policy.after_step(3, targets=targets[rank])
        assert policy.equal_after(4)
        torch.testing.assert_close(own, wanted, rtol=1e-6, atol=1e-6)

    on_replicas(3, body)


def test_groups_average_more_often_than_all() -> None:
    """Four replicas, groups of two; every average is weighted by targets, all averages are too."""
    targets = [10, 30, 60, 20]
    start = [values(rank).double() for rank in range(4)]
    near = [(10 * start[0] + 30 * start[1]) / 40, (60 * start[2] + 20 * start[3]) / 80]

    def run(rank: int, group: Group) -> None:
        own, alone = values(rank), ThreadGroup(Meeting(1, timeout_seconds=20), rank=0)
        policy = LocalSGD(
            Division(12, 1),
            values=own,
            every_steps=2,
            steps=10,
            group_replicas=2,
            outer_every_steps=4,
        )
        policy.enter(world=group, peers=group, inside=alone)
        for step in range(4):
            policy.before_step(step)
            policy.after_step(step, targets=targets[rank] // 2)
            if step == 1:
                torch.testing.assert_close(own.double(), near[rank // 2], rtol=1e-6, atol=1e-6)
                assert not policy.equal_after(2)
        assert policy.equal_after(4)
        wanted = (80 * near[0] + 160 * near[1]) / 240
        torch.testing.assert_close(own.double(), wanted, rtol=1e-6, atol=1e-6)
        everybody = group.gather(own)
        assert all(torch.equal(each, everybody[0]) for each in everybody)
        kept = policy.facts()
        assert (kept["near_at"], kept["all_at"], kept["group_targets"]) == (4, 4, 0)
        for step in range(4, 10):
            policy.after_step(step, targets=1)
        assert policy.equal_after(10), "a run ends with an average of all"

    replicas.on_replicas(4, run)


def test_the_last_step_of_a_run_ends_with_a_round() -> None:
    def body(rank: int, policy: LocalSGD, own: torch.Tensor) -> None:
        for step in range(10):
            policy.after_step(step, targets=1)
            assert policy.equal_after(step + 1) == (step + 1 in (4, 8, 10))

    on_replicas(2, body)


def test_gradients_stay_the_replicas_own() -> None:
    def body(rank: int, policy: LocalSGD, own: torch.Tensor) -> None:
        reduced = policy.reduce(Gradients(own.clone(), LAYOUT))
        assert torch.equal(reduced.values, values(rank))
        assert reduced.norm(numel=LAYOUT.numel) == pytest.approx(float(own.norm()), rel=1e-6)

    on_replicas(2, body)


def test_a_round_that_a_lost_peer_prevents_is_made_up_for() -> None:
    policy = LocalSGD(Division(12, 1), values=values(0), every_steps=1, steps=10)
    own = policy._values
    broken = Meeting(2, timeout_seconds=20)
    group = ThreadGroup(broken, rank=0)
    policy.enter(world=group, peers=group, inside=group)
    broken.fail("worker 1 is gone")
    with pytest.raises(WorkerError, match="worker 1 is gone"):
        policy.after_step(0, targets=5)
    assert torch.equal(own, values(0)), "nothing of the round was applied"
    assert not policy.equal_after(1)
    alone = ThreadGroup(Meeting(1, timeout_seconds=20), rank=0)
    policy.enter(world=alone, peers=alone, inside=alone)
    policy.before_step(1)
    assert policy.equal_after(1) and torch.equal(own, values(0))
    kept = {"targets": 0, "met_at": 1, "near_at": 1, "all_at": 1, "group_targets": 0}
    assert policy.facts() == kept
