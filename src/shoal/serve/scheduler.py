"""What one step computes: a pure function of the queues and the limits; no torch.

Tokens that running requests make come first, then parts of prompts, under one budget of tokens
(chunked prefill, Sarathi-Serve, arXiv 2403.02310), so a long prompt delays nobody by more than a
step. Where blocks run out, the youngest gives its own back and is computed again later, which
changes no bit of its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a step may take."""

    step_tokens: int
    """Rows of one forward."""
    block_tokens: int
    num_blocks: int
    max_running: int
    watermark: float = 0.05
    """Share of all blocks that stays free when another request is let in, unless none runs."""


@dataclass(frozen=True)
class View:
    """A request as the scheduler sees it."""

    key: int
    tokens: int
    """Known so far: the prompt, and what was made after it."""
    computed: int = 0
    """Of these, in the cache already (of a waiting one: found there)."""
    blocks: int = 0
    """Held; of a waiting one: that hold what was found."""
    own: int = 0
    """Of these, would be free if it let go; of a waiting one: free now, and taken by it."""
    proposals: int = 0
    """Guessed tokens after the last, to be checked in the same step."""


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` .. `start + count - 1` of a request, the last `proposals` of them guessed."""

    key: int
    start: int
    count: int
    proposals: int = 0


@dataclass(frozen=True)
class Plan:
    """Preempt first, then admit, then compute."""

    chunks: tuple[Chunk, ...] = ()
    admitted: tuple[int, ...] = ()
    preempted: tuple[int, ...] = ()
    """Youngest first."""


def blocks_for(tokens: int, block_tokens: int) -> int:
    """Blocks that so many tokens take."""
    return -(-tokens // block_tokens)


def plan_step(
    running: Sequence[View], waiting: Sequence[View], *, free: int, limits: Limits
) -> Plan:
    """The next step. `running`: oldest first; `waiting`: first come first; `free`: blocks.

    Nobody overtakes the head of the queue, and who is let in gets the blocks of all its tokens at
    once, so that prompts never wait for one another's. A request alone must fit into all blocks.
    """
    size, budget = limits.block_tokens, limits.step_tokens
    alive = list(running)
    chunks: list[Chunk] = []
    preempted: list[int] = []
    making = [view for view in running if view.tokens - view.computed == 1]
    for view in making:
        if view not in alive or budget < 1:
            continue
        guessed = min(view.proposals, budget - 1)
        more = blocks_for(view.tokens + guessed, size) - view.blocks
        if more > free:  # guesses are given up before anybody is
            guessed = 0
            more = blocks_for(view.tokens, size) - view.blocks
        while more > free and view in alive:
            youngest = alive.pop()
            preempted.append(youngest.key)
            free += youngest.own
        if view in alive:
            free -= max(0, more)
            budget -= 1 + guessed
            chunks.append(Chunk(view.key, view.computed, 1 + guessed, guessed))
    for view in alive:
        if view.tokens - view.computed > 1:
            count = _part(view, budget, size)  # its blocks were taken when it was let in
            if count > 0:
                budget -= count
                chunks.append(Chunk(view.key, view.computed, count))
    admitted: list[int] = []
    for view in waiting if not preempted else ():
        spare = round(limits.watermark * limits.num_blocks) if alive or admitted else 0
        need = blocks_for(view.tokens, size) - view.blocks + view.own
        full = len(alive) + len(admitted) >= limits.max_running
        if budget < 1 or full or need + spare > free:
            break
        free -= need
        count = _part(view, budget, size)
        budget -= count
        admitted.append(view.key)
        chunks.append(Chunk(view.key, view.computed, count))
    return Plan(tuple(chunks), tuple(admitted), tuple(preempted))


def _part(view: View, budget: int, size: int) -> int:
    """Tokens of a prompt that are computed now: to the end of a block where it goes on."""
    left = view.tokens - view.computed
    if left <= budget:
        return left
    whole = (view.computed + budget) // size * size - view.computed
    return whole if whole > 0 else max(0, budget)
