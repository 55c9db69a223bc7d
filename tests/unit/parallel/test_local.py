"""Holdings: what ranks have of a parameter covers it once, and the storage is what the box says."""

from __future__ import annotations

import itertools
from collections import Counter
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.layout import Layout
from shoal.models.placement import Placement
from shoal.parallel.local import Holding, Holdings, Segment, sharded_of
from shoal.parallel.mesh import Mesh
from shoal.parallel.tensor import segments_of
from unit.models.tiny_models import real_model

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))
CPU = torch.device("cpu")


def local_part(whole: torch.Tensor, holding: Holding) -> torch.Tensor:
    """The storage that `holding` describes, cut out of `whole` by hand."""
    for dim in range(whole.dim()):
        own = [each for each in holding.segments if each.dim == dim]
        if own:
            whole = torch.cat([whole.narrow(dim, each.start, each.size) for each in own], dim=dim)
    return whole if holding.rows is None else whole.narrow(0, *holding.rows)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
)
def test_ranks_cover_a_fused_parameter_once(
    pieces: list[int], other: int, tensor: int, shard: int, expert: bool
) -> None:
    """Cut by pieces over tensor, the other dim over expert, and the rows of what is left."""
    for dim in (0, 1):
        shape = (sum(pieces), other) if dim == 0 else (other, sum(pieces))
        whole = torch.arange(prod(shape), dtype=torch.float32).view(shape)
        placement = Placement("column", dim, pieces=tuple(pieces))
        seen = torch.zeros(shape)
        halves = [(0, other // 2), (other // 2, other)] if expert else [(0, other)]
        for rank, (low, high) in itertools.product(range(tensor), halves):
            segments = segments_of(placement, shape, rank=rank, degree=tensor)
            segments += (Segment(1 - dim, low, high - low),) if expert else ()
            rows = len(local_part(whole, Holding(shape, segments)))
            for part in range(shard):
                first, last = rows * part // shard, rows * (part + 1) // shard
                holding = Holding(shape, segments, rows=(first, last - first))
                mine = local_part(whole, holding)
                for slot in holding.slots:
                    at = tuple(slice(o, o + s) for o, s in zip(slot.box.offsets, slot.box.sizes))
                    assert torch.equal(slot.of(mine), whole[at])
                    seen[at] += 1
        assert torch.equal(seen, torch.ones(shape))


def test_a_fused_projection_gives_each_rank_whole_heads_of_every_piece() -> None:
    placement = Placement("column", 0, pieces=(8, 4, 4))
    segments = segments_of(placement, (16, 3), rank=1, degree=2)
    assert segments == (Segment(0, 4, 4), Segment(0, 10, 2), Segment(0, 14, 2))
    mine = torch.arange(8.0)[:, None].expand(8, 3).contiguous()
    slots = Holding((16, 3), segments).slots
    assert [slot.box.offsets for slot in slots] == [(4, 0), (10, 0), (14, 0)]
    slots[1].of(mine).fill_(-1.0)  # the slots are the storage itself
    assert mine[:, 0].tolist() == [0, 1, 2, 3, -1, -1, 6, 7]


@given(SHAPES, st.integers(1, 12))
def test_a_vocabulary_need_not_be_divisible(shape: tuple[int, int], degree: int) -> None:
    placement = Placement("vocabulary", 0)
    parts = [segments_of(placement, shape, rank=r, degree=degree)[0] for r in range(degree)]
    assert parts[0].start == 0 and parts[-1].start + parts[-1].size == shape[0]
    assert all(a.start + a.size == b.start for a, b in itertools.pairwise(parts))
    assert max(p.size for p in parts) - min(p.size for p in parts) <= 1


def test_a_number_has_one_slot() -> None:
    (slot,) = Holding(()).slots
    assert slot.of(torch.tensor(3.0)).item() == 3.0


degrees = st.fixed_dictionaries(
    {axis: st.integers(1, 3) for axis in ("pipeline", "shard", "context", "tensor", "replicate")}
)


@given(degrees)
def test_every_box_is_counted_and_saved_once(sizes: dict[str, int]) -> None:
    """For every layout, context and pipeline too: whole names, cut ones, and a tied one."""
    layout = Layout(**sizes)
    counted: Counter[tuple[str, int, int, int]] = Counter()
    saved: Counter[tuple[str, int, int, int]] = Counter()
    bytes_of: Counter[int] = Counter()
    wanted = set()
    for rank in range(layout.workers):
        mesh = Mesh(layout, rank, CPU)
        here = layout.coordinates(rank)
        stage, last = here["pipeline"], layout.pipeline - 1
        copies = frozenset(a for a in ("context", "tensor") if layout.degree(a) > 1)
        holdings = {f"norm.{n}.{stage}": Holding((100,), copies=copies) for n in range(4)}
        cut = (Segment(0, 50 * here["tensor"], 50),)
        holdings |= {
            f"linear.{n}.{stage}": Holding((50 * layout.tensor, 9), cut, copies=copies - {"tensor"})
            for n in range(6)
        }
        if stage in (0, last):
            ends = frozenset({"pipeline"}) if layout.pipeline > 1 else frozenset()
            holdings["embedding"] = Holding((1000, 9), copies=copies | ends)
        found = Holdings(mesh, holdings)
        replica = layout.replica_of(rank)
        owners, mine = found.owners(replicas=layout.replicate), found.here(replica)
        for name, holding in found.items():
            part = here["tensor"] if holding.segments else 0
            key = (name, part, here["shard"], 0)
            wanted.add(key)
            counted[key] += found.counts(name) and replica == 0
            own = owners.get(name) == mine
            saved[key] += own
            bytes_of[rank] += own * holding.numel // (layout.tensor if holding.segments else 1)
    assert set(counted.values()) == {1}
    assert set(saved) == wanted and set(saved.values()) == {1}


def test_a_tensor_of_a_layout_is_saved_by_as_many_as_hold_it() -> None:
    layout = Layout(replicate=2, context=2)
    named = {f"w{n}": Holding((10, 10), copies=frozenset({"context"})) for n in range(8)}
    owners = Holdings(Mesh(layout, 0, CPU), named).owners(replicas=2)
    assert Counter(owners.values()) == {(0, 0): 2, (0, 1): 2, (1, 0): 2, (1, 1): 2}


def test_a_model_that_was_not_cut_says_so() -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: parallel.apply has not seen"):
        sharded_of(real_model("llama"))
