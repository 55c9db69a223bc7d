"""Shares of a batch: by measured speed, every micro batch once, and as early an end as can be."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.sync.shares import EVERY_STEPS, Division, Shares, allocate

TIMES = st.lists(st.integers(1, 10**9), min_size=1, max_size=4)


@given(TIMES, st.integers(0, 6))
def test_no_other_allocation_ends_earlier(times: list[int], more: int) -> None:
    count, size = len(times) + more, len(times)
    found = allocate(count, times)
    assert sum(found) == count and min(found) >= 1
    ways = itertools.product(range(1, count + 1), repeat=size)
    best = min(max(n * t for n, t in zip(way, times)) for way in ways if sum(way) == count)
    assert max(n * t for n, t in zip(found, times)) == best


def agreed(division: Division, times: list[int]) -> Shares:
    shares = Shares(division, measured=True)
    shares.enter(len(times))
    shares.agree(times, step=0)
    return shares


@given(
    st.lists(st.integers(1, 100), min_size=2, max_size=4),
    st.integers(1, 4),
    st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    st.booleans(),
)
def test_every_sample_is_computed_once_in_any_step(
    times: list[int], each: int, takes: tuple[int, int], alone: bool
) -> None:
    least, multiple = takes
    division = Division(6 * len(times) * each * multiple, 3, 2, least=least, multiple=multiple)
    shares = agreed(division, times)
    for step in range(20):
        parts = [shares.share(replica, step, alone=alone) for replica in range(len(times))]
        assert parts[0].start == 0 and parts[-1].stop == division.global_batch_samples
        assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
        units = [len(part) / 6 for part in parts]
        assert all(n % multiple == 0 for n in units), "what a schedule takes"
        assert alone or each * multiple < least or min(units) >= least


def test_a_replica_of_a_third_of_the_speed_computes_a_quarter() -> None:
    shares = agreed(Division(16, 2), [10, 30])
    assert [len(shares.share(0, step)) for step in (0, 1, 2)] == [8, 12, 12], "from the next on"
    turns = [len(shares.share(1, step, alone=True)) for step in range(1, 17)]
    assert sum(turns) == 16 * 16 // 4
    assert set(turns) == {0, 8}, "steps of its usual size, and it sits out the others"
    (note,) = shares.notes()
    assert note[0] == "shares" and "compute 75.0%, 25.0%" in note[1]["text"]


def test_shares_stay_where_nothing_is_won() -> None:
    shares = agreed(Division(16, 2), [10, 11])
    assert not shares.notes() and len(shares.share(0, 5)) == 8
    shares.agree([10, 30], step=10)
    assert len(shares.share(0, 11)) == 12
    shares.agree([10, 29], step=20)
    assert [note[1]["nanoseconds"] for note in shares.notes()] == [[10, 30]]
    shares.agree([20, 20], step=30)
    assert len(shares.share(0, 30)) == 12 and len(shares.share(0, 31)) == 8, "it has caught up"


def test_a_replica_that_computed_nothing_is_as_it_was() -> None:
    shares = agreed(Division(16, 2), [10, 0])
    assert not shares.notes(), "nothing is known of it yet"
    shares.agree([10, 30], step=10)
    shares.agree([30, 0], step=20)
    assert [note[1]["nanoseconds"] for note in shares.notes()] == [[10, 30], [30, 30]]


def test_all_ask_at_the_same_steps_and_tell_their_median() -> None:
    shares = Shares(Division(16, 2), measured=True)
    shares.enter(2)
    told = []
    for step in range(2 * EVERY_STEPS + 1):
        shares.note(9.0 if step == 3 else 0.2, micro_batches=2)
        told.append(shares.told(step))
    assert [step for step, each in enumerate(told) if each is not None] == [10, 20]
    assert told[EVERY_STEPS] == 100_000_000, "0.1 s a micro batch; one slow step is none"
    alone = Shares(Division(16, 2), measured=True)
    assert alone.told(0) is None and alone.told(50) is None, "one replica has nobody to ask"


def test_state_goes_on_in_as_many_replicas_only() -> None:
    kept = agreed(Division(16, 2), [10, 30]).facts()
    again = Shares(Division(16, 2), measured=True)
    again.enter(2)
    again.restore(kept)
    assert len(again.share(0, 0)) == 12
    again.enter(4)
    assert [len(again.share(r, 0)) for r in range(4)] == [4] * 4
    again.restore(kept)
    assert [len(again.share(r, 0)) for r in range(4)] == [4] * 4
    equal = Shares(Division(16, 2))
    equal.enter(2)
    equal.restore(kept)
    assert len(equal.share(0, 0)) == 8, "the recipe asks for equal ones now"


@pytest.mark.parametrize("alone", [False, True])
def test_fewer_micro_batches_than_replicas_need_are_divided_equally(alone: bool) -> None:
    shares = agreed(Division(4, 2, least=2), [10, 30])
    assert [len(shares.share(r, 1)) for r in range(2)] == [2, 2]
