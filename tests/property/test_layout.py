"""Layouts: ranks and coordinates are one to one; shares cover a batch once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.layout import AXES, Layout, split_evenly

degrees = st.fixed_dictionaries({axis: st.integers(1, 4) for axis in AXES})


@given(degrees)
def test_ranks_and_coordinates_are_one_to_one(sizes: dict[str, int]) -> None:
    layout = Layout(**sizes)
    seen = [tuple(layout.coordinates(rank).values()) for rank in range(layout.workers)]
    assert len(set(seen)) == layout.workers == layout.replicate * layout.replica_workers
    for rank, coordinates in enumerate(seen):
        assert layout.rank_of(dict(zip(AXES, coordinates))) == rank
    assert seen == sorted(seen), "the last axis varies fastest"


@given(degrees)
def test_the_ranks_of_a_replica_are_one_block(sizes: dict[str, int]) -> None:
    layout = Layout(**sizes)
    k = layout.replica_workers
    for replica in range(layout.replicate):
        block = [r for r in range(layout.workers) if layout.coordinates(r)["replicate"] == replica]
        assert block == list(range(replica * k, (replica + 1) * k))
        assert block == list(layout.replica_ranks(replica))
    for rank in range(layout.workers):
        here = layout.coordinates(rank)
        inside = layout.of_one_replica.coordinates(layout.replica_rank(rank))
        assert layout.replica_of(rank) == here["replicate"]
        assert {**inside, "replicate": here["replicate"]} == here
        assert rank in layout.peers(layout.replica_rank(rank))
        assert layout.with_workers(layout.workers) == layout


@given(degrees, st.sets(st.sampled_from(AXES)))
def test_groups_are_a_partition_that_differs_only_on_its_axes(
    sizes: dict[str, int], axes: set[str]
) -> None:
    layout = Layout(**sizes)
    groups = list(layout.groups(*axes))
    assert sorted(rank for group in groups for rank in group) == list(range(layout.workers))
    for group in groups:
        rows = [layout.coordinates(rank) for rank in group]
        assert all(row[axis] == rows[0][axis] for row in rows for axis in AXES if axis not in axes)
        assert len({tuple(row.values()) for row in rows}) == len(group)
        assert group == sorted(group)


@given(degrees, st.data())
def test_experts_meet_along_shard_and_context(sizes: dict[str, int], data: st.DataObject) -> None:
    """expert_shard x expert is another way to count the ranks of shard x context."""
    both = sizes["shard"] * sizes["context"]
    expert = data.draw(st.sampled_from([n for n in range(1, both + 1) if both % n == 0]))
    layout = Layout(**sizes, expert=expert)
    rows = list(layout.groups("shard", "context"))
    assert list(layout.groups("expert_shard", "expert")) == rows
    for axis, degree in (("expert", expert), ("expert_shard", both // expert)):
        assert layout.degree(axis) == degree
        groups = list(layout.groups(axis))
        assert sorted(rank for group in groups for rank in group) == list(range(layout.workers))
        for group in groups:
            assert [layout.coordinate(axis, rank) for rank in group] == list(range(degree))
            assert any(set(group) <= set(row) for row in rows)


@given(st.integers(0, 200), st.integers(1, 20), st.integers(1, 8))
def test_shares_cover_a_batch_once_in_whole_multiples(
    units: int, parts: int, multiple: int
) -> None:
    shares = [
        split_evenly(units * multiple, parts, index, multiple=multiple) for index in range(parts)
    ]
    covered = [sample for share in shares for sample in range(share.start, share.stop)]
    assert covered == list(range(units * multiple))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= multiple
    assert all(share.start % multiple == 0 for share in shares)


def test_what_is_no_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="tensor: expected an integer of at least 1, got 0"):
        Layout(tensor=0)
    with pytest.raises(ValueError, match="expert: 3 does not divide shard x context = 4"):
        Layout(shard=2, context=2, expert=3)
    with pytest.raises(ValueError, match=r"rank 4 is outside 0\.\.3"):
        Layout(replicate=4).coordinates(4)
    with pytest.raises(ValueError, match=r"replicate coordinate 4 is outside 0\.\.3"):
        Layout(replicate=4).rank_of({"replicate": 4})
    with pytest.raises(ValueError, match="5 workers are no whole replicas of 2"):
        Layout(tensor=2).with_workers(5)
    with pytest.raises(ValueError, match="7 is not a multiple of 2"):
        split_evenly(7, 2, 0, multiple=2)


def test_layouts_in_words() -> None:
    assert str(Layout()) == "one worker"
    assert str(Layout(replicate=2, tensor=4)) == "replicate 2, tensor 4"
