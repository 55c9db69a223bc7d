"""Policy every-step: shares cover the batch, and every way of summing gives the sum."""

from __future__ import annotations

import threading

import pytest
import torch

from shoal.comm.flat import CHUNK, FlatLayout
from shoal.comm.group import Group, ProcessGroup
from shoal.comm.threads import Meeting, ThreadGroup
from shoal.comm.tree import Node, TreeSum
from shoal.sync.every_step import EveryStep
from shoal.sync.policy import Division, Gradients, Reduced

LAYOUT = FlatLayout.of({"decay": {"a": (3, CHUNK)}, "plain": {"b": (700,)}, "frozen": {}})


def gradient(rank: int, *, leaf: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + leaf)
    return torch.randn(LAYOUT.numel, generator=generator)


def policy_of(group: Group, division: Division) -> EveryStep:
    policy = EveryStep(division, bucket_bytes=4096)
    policy.enter(world=group, peers=group, inside=group)
    return policy


def in_threads(size: int, *, tree: bool = False) -> list[Reduced]:
    """What each of `size` threads gets; copies, for slices may share memory."""
    meeting = Meeting(size, timeout_seconds=30)
    found: dict[int, Reduced] = {}

    def body(rank: int) -> None:
        group = ThreadGroup(meeting, rank=rank)
        sync = policy_of(group, Division(12, 1))
        share = sync.share(0)
        if tree:
            nodes = TreeSum()
            for leaf in range(share.start, share.stop):
                nodes.push(Node(0, leaf, gradient(0, leaf=leaf)))
            reduced = sync.reduce(Gradients(gradient(rank), LAYOUT, nodes.nodes))
        else:
            reduced = sync.reduce(Gradients(gradient(rank), LAYOUT))
        found[rank] = Reduced(reduced.span, reduced.values.clone())
        group.barrier()

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_threads_get_their_slice_of_the_sum(size: int) -> None:
    parts = in_threads(size)
    assert parts[0].span.start == 0 and parts[-1].span.stop == LAYOUT.numel
    whole = torch.cat([part.values for part in parts])
    wanted = gradient(0)
    for rank in range(1, size):
        wanted = wanted + gradient(rank)
    assert torch.equal(whole, wanted), "added in rank order, so the same bits"


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_tree_has_the_same_bits_for_any_number_of_threads(size: int) -> None:
    sync = policy_of(ProcessGroup(), Division(12, 1))
    tree = TreeSum()
    for leaf in range(12):
        tree.push(Node(0, leaf, gradient(0, leaf=leaf)))
    wanted = sync.reduce(Gradients(gradient(0), LAYOUT, tree.nodes)).values
    found = torch.cat([part.values for part in in_threads(size, tree=True)])
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shares_cover_the_batch_in_whole_micro_batches(size: int) -> None:
    meeting = Meeting(size, timeout_seconds=5)
    covered: list[int] = []
    for rank in range(size):
        group = ThreadGroup(meeting, rank=rank)
        sync = policy_of(group, Division(24, 3))
        share = sync.share(0)
        assert share.start % 3 == 0
        covered += range(share.start, share.stop)
    assert covered == list(range(24))
