"""Which block of the cache belongs to whom: a pool with reference counts and shared prefixes.

A full block is known by the block before it and the ids of its tokens, compared themselves: no hash
stands for them, so no two texts are taken for one. A freed block keeps its content, and can be
taken up again, until it is the one that was freed longest ago and another is wanted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

Key = tuple[Hashable, tuple[int, ...]]


class Blocks:
    """Blocks 1 .. num_blocks - 1; block 0 is for padding and belongs to nobody."""

    def __init__(self, *, num_blocks: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.num_blocks = num_blocks - 1
        self._counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._by_key: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}
        self._serial: dict[int, int] = {}
        self._next = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be taken."""
        return len(self._free)

    def match(self, tokens: Sequence[int], *, root: Hashable) -> list[int]:
        """Blocks that hold the beginning of `tokens`; never all: one token is to be computed.

        `root`: what else the content depends on (an adapter). They are not taken by this.
        """
        found: list[int] = []
        parent: Hashable = ("root", root)
        size = self.block_tokens
        for start in range(0, len(tokens) - size, size):
            block = self._by_key.get((parent, tuple(tokens[start : start + size])))
            if block is None:
                break
            found.append(block)
            parent = self._serial[block]
        return found

    def num_idle(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` nobody uses just now."""
        return sum(self._counts[block] == 0 for block in blocks)

    def num_own(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` would be free if their one user let go."""
        return sum(self._counts[block] == 1 for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Take blocks that `match` found."""
        for block in blocks:
            self._counts[block] += 1
            self._free.pop(block, None)

    def take(self, count: int) -> list[int]:
        """`count` blocks of any content; there must be so many free."""
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            key = self._keys.pop(block, None)
            if key is not None:
                del self._by_key[key], self._serial[block]
            self._counts[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Let go; the last of a sequence is the first to be overwritten."""
        for block in reversed(blocks):
            assert self._counts[block] > 0, f"block {block} is released twice"
            self._counts[block] -= 1
            if self._counts[block] == 0:
                self._free[block] = None
                if block not in self._keys:  # worth nothing to anybody: used up first
                    self._free.move_to_end(block, last=False)

    def remember(
        self, blocks: Sequence[int], number: int, tokens: Sequence[int], *, root: Hashable
    ) -> None:
        """Block `number` of a sequence is full, with these `tokens` (of the whole sequence)."""
        parent: Hashable = ("root", root)
        if number:
            if blocks[number - 1] not in self._serial:
                return  # the one before it is somebody else's twin, which is not known
            parent = self._serial[blocks[number - 1]]
        size, block = self.block_tokens, blocks[number]
        key = (parent, tuple(tokens[number * size : (number + 1) * size]))
        if block not in self._keys and key not in self._by_key:
            self._by_key[key], self._keys[block] = block, key
            self._serial[block] = self._next
            self._next += 1
