"""What ranks agree on when a generation begins, over threads that stand for ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from shoal.comm.flat import FlatLayout
from shoal.comm.group import Group
from shoal.comm.threads import Meeting, ThreadGroup
from shoal.engine.membership.agree import FRESH, Position, agree, check_same_program
from shoal.engine.membership.digest import ReplicasDiffer, differing_tensors, digest_of
from shoal.engine.state import FlatState
from shoal.errors import RunError
from shoal.layout import Layout
from states import state_of


def on_ranks(size: int, body: Callable[[Group], Any]) -> list[Any]:
    """Call `body` on every rank; its results or errors in rank order."""
    meeting, found = Meeting(size, timeout_seconds=20), [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = body(ThreadGroup(meeting, rank=rank))
        except Exception as error:
            found[rank] = error
            if not isinstance(error, RunError):  # that one is raised by all, in one place
                meeting.fail(str(error))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def state(seed: int) -> FlatState:
    """Each rank's own memory, as processes have it."""
    layout = FlatLayout.of(
        {"matrices": {}, "decay": {"a": (64, 8)}, "plain": {"b": (64,)}, "frozen": {}}
    )
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(layout.numel, generator=generator)
    moments = {"exp_avg": torch.randn(layout.numel, generator=generator)}
    return state_of(layout, values, moments)


def test_the_newest_state_is_everybodys() -> None:
    """Rank 2 has taken one step more: its reduction was complete, so the step counts."""
    states = [state(1), state(1), state(2), state(3)]
    steps = [7, 7, 8, FRESH]

    def body(group: Group) -> Position:
        own = steps[group.rank]
        facts = {"of": group.rank}
        position = Position(own, evaluated_at=own - 1, saved_at=5, facts=facts)
        layout = Layout(replicate=group.size)
        return agree(group, position, state=states[group.rank], layout=layout)

    found = on_ranks(4, body)
    assert [each.step for each in found] == [8] * 4
    assert [each.facts for each in found] == [{"of": 2}] * 4
    assert {digest_of(each) for each in states} == {digest_of(state(2))}


def test_nobody_has_a_state() -> None:
    layout = Layout(replicate=2)
    found = on_ranks(
        2, lambda group: agree(group, Position(), state=state(group.rank), layout=layout)
    )
    assert [each.step for each in found] == [FRESH, FRESH]


def test_what_only_some_have_done_is_done_again() -> None:
    def body(group: Group) -> Position:
        position = Position(8, evaluated_at=8 if group.rank else 0, saved_at=8 - group.rank)
        return agree(group, position, state=state(1), layout=Layout(replicate=2))

    for each in on_ranks(2, body):
        assert (each.evaluated_at, each.saved_at) == (0, 7)


def test_ranks_with_different_recipes_or_sizes() -> None:
    def body(group: Group) -> None:
        recipe = {"train": {"steps": 10 + group.rank}, "seed": 0}
        check_same_program(group, recipe=recipe, parameters=5 - group.rank)

    for error in on_ranks(2, body):
        assert isinstance(error, RunError)
        assert "recipe.train.steps: rank 0 has 10, rank 1 has 11" in str(error)
        assert "parameters: rank 0 has 5, rank 1 has 4" in str(error)
        assert "seed" not in str(error)


@pytest.mark.parametrize("vector", ["values", "exp_avg"])
def test_one_bit_changes_the_digest_and_names_the_tensor(vector: str) -> None:
    states = [state(1) for _ in range(3)]
    flipped = states[1].values if vector == "values" else states[1].vectors[vector].tensor
    flipped.view(torch.int32)[13] ^= 1 << 5
    assert digest_of(states[1]) != digest_of(states[0]) == digest_of(states[2])
    found = on_ranks(
        3, lambda group: differing_tensors(group, states[group.rank], layout=Layout(replicate=3))
    )
    kind = "parameter" if vector == "values" else vector
    assert found == [{f"{kind} a": [1]}] * 3


def repairs(digests: list[int], **degrees: int) -> object:
    return ReplicasDiffer(digests, layout=Layout(**degrees)).repairs()


def test_majorities() -> None:
    assert repairs([5, 5, 6], replicate=3) == [(0, [2])]
    assert repairs([6, 5, 5, 5], replicate=4) == [(1, [0])]
    assert repairs([5, 6], replicate=2) is None
    assert repairs([5, 5, 6, 6], replicate=4) is None
    # two workers a replica: each position by itself
    assert repairs([5, 7, 5, 7, 6, 7], replicate=3, tensor=2) == [(0, [4])]
    assert repairs([5, 7, 5, 8, 6, 7], replicate=3, tensor=2) == [(0, [4]), (1, [3])]
    assert repairs([5, 7, 6, 7], replicate=2, tensor=2) is None
