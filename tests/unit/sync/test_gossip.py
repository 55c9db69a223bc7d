"""Policy gossip: exchanges are products with doubly stochastic matrices, by numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from replicas import drawn, on_replicas, policy_of
from shoal.comm.group import Group
from shoal.comm.threads import Meeting, ThreadGroup
from shoal.config.sync import Gossip
from shoal.errors import WorkerError


def matrix(graph: str, *, size: int, number: int) -> np.ndarray:
    """The mixing matrix of the literature: who hears whom in exchange `number`."""
    shift = np.roll(np.eye(size), 1, axis=1)
    if graph == "ring":
        return (np.eye(size) + shift + shift.T) / 3 if size > 2 else (np.eye(2) + shift) / 2
    hops = [2**k for k in range(max(1, int(np.ceil(np.log2(size)))))]
    far = hops[number % len(hops)]
    return (np.eye(size) + np.linalg.matrix_power(shift, far).T) / 2


@pytest.mark.parametrize("size", [2, 3, 4, 5])
@pytest.mark.parametrize("graph", ["ring", "exponential"])
def test_exchanges_are_the_products_of_the_graph(graph: str, size: int) -> None:
    steps = 6

    def body(rank: int, group: Group) -> list[Tensor]:
        values, after = drawn(rank, dtype=torch.float64), []
        policy = policy_of(Gossip(graph=graph), group, values, steps=steps)
        for step in range(steps - 1):
            policy.before_step(step)
            policy.after_step(step, targets=1)
            after.append(values.clone())
            assert not policy.equal_after(step + 1)
        policy.after_step(steps - 1, targets=1)
        assert policy.equal_after(steps)
        return [*after, values]

    found = [torch.stack(each).numpy() for each in on_replicas(size, body)]
    wanted = np.stack([drawn(rank, dtype=torch.float64).numpy() for rank in range(size)])
    mean = wanted.mean(axis=0)
    for step in range(steps - 1):
        mixing = matrix(graph, size=size, number=step)
        assert np.allclose(mixing.sum(0), 1) and np.allclose(mixing.sum(1), 1)
        wanted = mixing @ wanted
        np.testing.assert_allclose([each[step] for each in found], wanted, atol=1e-12)
    for each in found:
        np.testing.assert_allclose(each[-1], mean, atol=1e-12)


def test_an_exponential_graph_of_four_agrees_in_two_exchanges() -> None:
    def body(rank: int, group: Group) -> Tensor:
        values = drawn(rank, dtype=torch.float64)
        policy = policy_of(Gossip(), group, values, steps=9)
        for step in range(2):
            policy.after_step(step, targets=1)
        return values

    first, *others = on_replicas(4, body)
    for each in others:
        torch.testing.assert_close(each, first, rtol=0, atol=1e-14)


def test_the_distance_between_replicas_is_noted_where_all_meet() -> None:
    def body(rank: int, group: Group) -> None:
        values = drawn(rank, dtype=torch.float64)
        section = Gossip(every_steps=100, meet_every_steps=2)
        policy = policy_of(section, group, values, steps=9)
        policy.after_step(0, targets=1)
        assert not policy.notes() and not policy.meets_after(1)
        policy.after_step(1, targets=1)
        assert policy.meets_after(2) and not policy.equal_after(2)
        ((name, fields),) = policy.notes()
        every = np.stack([drawn(each, dtype=torch.float64).numpy() for each in range(3)])
        apart = np.sqrt(((every - every.mean(0)) ** 2).sum() / 3)
        assert name == "consensus" and fields["distance"] == pytest.approx(apart, rel=1e-9)

    on_replicas(3, body)


def test_a_lost_peer_leaves_out_an_exchange_but_not_the_average_at_the_end() -> None:
    broken = Meeting(2, timeout_seconds=20)
    values = drawn(0)
    policy = policy_of(Gossip(), ThreadGroup(broken, rank=0), values, steps=2)
    broken.fail("worker 1 is gone")
    for step in range(2):
        with pytest.raises(WorkerError, match="worker 1 is gone"):
            policy.after_step(step, targets=1)
    assert torch.equal(values, drawn(0)) and not policy.equal_after(2)
    alone = ThreadGroup(Meeting(1, timeout_seconds=20), rank=0)
    policy.enter(world=alone, peers=alone, inside=alone)
    policy.before_step(2)
    assert policy.equal_after(2) and policy.round == 2
