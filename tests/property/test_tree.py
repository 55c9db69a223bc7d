"""The fixed tree: the same bits however the leaves were divided over ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.tree import Node, TreeSum, node_places


def leaf(index: int) -> torch.Tensor:
    """Values of very different size, so that another order of addition shows."""
    generator = torch.Generator().manual_seed(index)
    return torch.randn(64, generator=generator) * 10.0 ** (index % 7)


def tree_of(start: int, stop: int) -> TreeSum:
    tree = TreeSum()
    for index in range(start, stop):
        tree.push(Node(0, index, leaf(index)))
    return tree


def reference(first: int, count: int, *, level: int) -> torch.Tensor | None:
    """The definition: node (level, index) is left + right, or left alone."""
    begin = first << level
    if begin >= count:
        return None
    if level == 0:
        return leaf(first)
    left = reference(2 * first, count, level=level - 1)
    right = reference(2 * first + 1, count, level=level - 1)
    assert left is not None
    return left if right is None else left + right


def divided(count: int, cuts: list[int]) -> torch.Tensor:
    edges = [0, *sorted(min(cut, count) for cut in cuts), count]
    whole = TreeSum()
    for start, stop in itertools.pairwise(edges):
        part = tree_of(start, stop)
        places = [(node.level, node.index) for node in part.nodes]
        assert places == node_places(start, stop)
        for node in part.nodes:
            whole.push(Node(node.level, node.index, node.value.clone()))
    total = whole.root()
    assert whole.nodes == []
    return total


@given(st.integers(1, 70), st.lists(st.integers(0, 70), max_size=6))
def test_any_division_gives_the_bits_of_the_definition(count: int, cuts: list[int]) -> None:
    level = (count - 1).bit_length()
    wanted = reference(0, count, level=level)
    assert wanted is not None
    assert torch.equal(divided(count, cuts), wanted)


def test_the_order_matters_for_these_leaves() -> None:
    """Else the test above would say nothing."""
    straight = leaf(0)
    for index in range(1, 37):
        straight = straight + leaf(index)
    assert not torch.equal(straight, tree_of(0, 37).root())


@given(st.integers(0, 200), st.integers(1, 200))
def test_nodes_cover_their_leaves_once_and_are_few(start: int, count: int) -> None:
    places = node_places(start, start + count)
    covered = [
        leaf for level, index in places for leaf in range(index << level, (index + 1) << level)
    ]
    assert covered == list(range(start, start + count))
    assert len(places) <= 2 * count.bit_length()


@given(st.integers(1, 64))
def test_buffers_come_back(count: int) -> None:
    """At most log2 + 1 nodes wait at a time; the others are free to be used again."""
    tree = TreeSum()
    for index in range(count):
        before = len(tree.nodes)
        freed = tree.push(Node(0, index, torch.zeros(1)))
        assert (freed is None) == (len(tree.nodes) == before + 1)
        assert len(tree.nodes) <= count.bit_length()


def test_no_leaves_no_root() -> None:
    with pytest.raises(ValueError, match="a sum of no leaves has no root"):
        TreeSum().root()
