"""Plans of steps and blocks of the cache: what must hold for any requests in any order."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.serve.blocks import Blocks
from shoal.serve.scheduler import Limits, View, blocks_for, plan_step

SIZE = 4


@dataclass
class Asked:
    """A request of the simulation: tokens are counted, not made."""

    key: int
    prompt: int
    made_wanted: int
    made: int = 0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.prompt + self.made


requests = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=12)


@settings(max_examples=150)
@given(
    sizes=requests,
    num_blocks=st.integers(11, 40),
    step_tokens=st.integers(1, 24),
    max_running=st.integers(1, 8),
    guesses=st.integers(0, 3),
)
def test_every_request_is_answered_within_the_limits(
    sizes: list[tuple[int, int]], num_blocks: int, step_tokens: int, max_running: int, guesses: int
) -> None:
    limits = Limits(step_tokens, SIZE, num_blocks, max_running)
    blocks = Blocks(num_blocks=num_blocks + 1, block_tokens=SIZE)
    waiting = [Asked(n, prompt, made) for n, (prompt, made) in enumerate(sizes)]
    running: list[Asked] = []
    done: list[int] = []
    for _ in range(20_000):
        if not waiting and not running:
            break
        views = [
            View(
                each.key,
                each.tokens,
                each.computed,
                len(each.blocks),
                len(each.blocks),
                min(guesses, each.made_wanted - each.made - 1),
            )
            for each in running
        ]
        plan = plan_step(
            views,
            [View(each.key, each.tokens) for each in waiting],
            free=blocks.num_free,
            limits=limits,
        )
        assert sum(chunk.count for chunk in plan.chunks) <= step_tokens
        # the youngest gives way first, and nobody overtakes the head of the queue
        assert list(plan.preempted) == [each.key for each in running[::-1]][: len(plan.preempted)]
        assert list(plan.admitted) == [each.key for each in waiting][: len(plan.admitted)]
        assert not (plan.preempted and plan.admitted)
        for key in plan.preempted:
            gone = next(each for each in running if each.key == key)
            running.remove(gone)
            blocks.release(gone.blocks)
            gone.blocks, gone.computed = [], 0
            waiting.insert(0, gone)
        for _ in plan.admitted:
            new = waiting.pop(0)
            new.blocks = blocks.take(blocks_for(new.tokens, SIZE))
            running.append(new)
        assert len(running) <= max_running
        assert plan.chunks, "every step gets on with something"
        by_key = {each.key: each for each in running}
        for chunk in plan.chunks:
            one = by_key[chunk.key]
            assert chunk.start == one.computed and chunk.count > 0
            end = chunk.start + chunk.count
            one.blocks += blocks.take(max(0, blocks_for(end, SIZE) - len(one.blocks)))
            one.computed = min(end, one.tokens)
            if end >= one.tokens:
                one.made += 1
            if one.made == one.made_wanted:
                blocks.release(one.blocks)
                running.remove(one)
                done.append(one.key)
    assert sorted(done) == list(range(len(sizes)))
    assert blocks.num_free == num_blocks, "no block is leaked"


def test_what_is_made_comes_before_prompts_and_a_part_ends_with_a_block() -> None:
    limits = Limits(step_tokens=10, block_tokens=4, num_blocks=100, max_running=4)
    making = [View(key, 9, 8, 3, 3) for key in (0, 1, 2)]
    plan = plan_step(making, [View(3, 40)], free=90, limits=limits)
    assert [(chunk.key, chunk.count) for chunk in plan.chunks] == [(0, 1), (1, 1), (2, 1), (3, 4)]


@settings(max_examples=100)
@given(
    texts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), min_size=1, max_size=10),
    roots=st.lists(st.sampled_from([None, "a"]), min_size=10, max_size=10),
)
def test_a_found_prefix_is_the_very_text(texts: list[list[int]], roots: list[str | None]) -> None:
    """Oracle: what was written to each block, kept beside."""
    blocks = Blocks(num_blocks=9, block_tokens=SIZE)
    content: dict[int, tuple[str | None, tuple[int, ...]]] = {}
    for text, root in zip(texts, roots):
        found = blocks.match(text, root=root)
        assert len(found) * SIZE < len(text), "one token is left to compute"
        for number, block in enumerate(found):
            assert content[block] == (root, tuple(text[: (number + 1) * SIZE]))
        more = blocks_for(len(text), SIZE) - len(found)
        blocks.share(found)
        assert blocks.num_free >= more
        own = [*found, *blocks.take(more)]
        for number in range(len(found), len(text) // SIZE):
            content[own[number]] = (root, tuple(text[: (number + 1) * SIZE]))
            blocks.remember(own, number, text, root=root)
        blocks.release(own)
    assert blocks.num_free == blocks.num_blocks
