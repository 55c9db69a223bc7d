"""Sums in one fixed binary tree, whoever computed the leaves.

Leaf i is the gradient of global micro batch i. Node (level, index) covers the leaves
[index * 2^level, (index + 1) * 2^level); it is left + right, or left alone when no leaf of the
right exists. A rank adds up the complete nodes inside its own range as leaves arrive (at most
log2 of them wait at a time); the nodes of all ranks, in leaf order, give the root. Floating-point
addition is the same wherever it is done, so the root has the same bits for any division.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Node:
    """A complete node: its level, its index in the level, and its value."""

    level: int
    index: int
    value: Tensor

    @property
    def first_leaf(self) -> int:
        return self.index << self.level


def node_places(start: int, stop: int) -> list[tuple[int, int]]:
    """(level, index) of the nodes that leaves `start` to `stop` leave behind, in leaf order."""
    places: list[tuple[int, int]] = []
    for leaf in range(start, stop):
        level, index = 0, leaf
        while places and index % 2 == 1 and places[-1] == (level, index - 1):
            places.pop()
            level, index = level + 1, index // 2
        places.append((level, index))
    return places


class TreeSum:
    """Adds nodes that arrive in leaf order. Values pushed are owned, and changed in place."""

    def __init__(self) -> None:
        self._nodes: list[Node] = []

    def push(self, node: Node) -> Tensor | None:
        """Add a node; returns a tensor that is free again, if the sum needed one less."""
        freed: Tensor | None = None
        while (
            self._nodes
            and node.index % 2 == 1
            and (self._nodes[-1].level, self._nodes[-1].index) == (node.level, node.index - 1)
        ):
            left = self._nodes.pop()
            left.value.add_(node.value)
            freed = node.value
            node = Node(node.level + 1, node.index // 2, left.value)
        self._nodes.append(node)
        return freed

    @property
    def nodes(self) -> list[Node]:
        """The complete nodes so far, in leaf order."""
        return list(self._nodes)

    def root(self) -> Tensor:
        """The whole sum; a missing right neighbour is no term at all. Empties the tree."""
        if not self._nodes:
            raise ValueError("a sum of no leaves has no root")
        node = self._nodes.pop()
        while self._nodes:
            left = self._nodes[-1]
            while node.level < left.level:
                node = Node(node.level + 1, node.index // 2, node.value)
            self._nodes.pop()
            left.value.add_(node.value)
            node = Node(left.level + 1, left.index // 2, left.value)
        return node.value
