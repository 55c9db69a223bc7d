"""Boxes: what ranks hold of a parameter covers it once, and the storage is what the box says."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.models.placement import Placement
from shoal.parallel.held import Cut, cut_of, held, pieces_of
from unit.models.tiny_models import real_model

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))


def _local(whole: torch.Tensor, cut: Cut) -> torch.Tensor:
    """What the tensor axis leaves on a rank."""
    if cut.dim is None:
        return whole
    parts = [whole.narrow(cut.dim, start, size) for start, size in cut.segments]
    return torch.cat(parts, dim=cut.dim)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 9), st.integers(1, 4))
def test_pieces_of_a_fused_parameter_cover_it_once(
    pieces: list[int], other: int, degree: int
) -> None:
    for dim in (0, 1):
        shape = (sum(pieces), other) if dim == 0 else (other, sum(pieces))
        whole = torch.arange(shape[0] * shape[1], dtype=torch.float32).view(shape)
        placement = Placement("column", dim, pieces=tuple(pieces))
        seen = torch.zeros(shape)
        for rank in range(degree):
            cut = cut_of(placement, shape, rank=rank, degree=degree)
            mine = _local(whole, cut)
            for piece in pieces_of(mine, mine, cut):
                at = tuple(slice(o, o + s) for o, s in zip(piece.box.offsets, piece.box.sizes))
                assert torch.equal(piece.tensor, whole[at])
                seen[at] += 1
        assert torch.equal(seen, torch.ones(shape))


def test_a_fused_projection_gives_each_rank_whole_heads_of_every_piece() -> None:
    placement = Placement("column", 0, pieces=(8, 4, 4))
    cut = cut_of(placement, (16, 3), rank=1, degree=2)
    assert cut.segments == ((4, 4), (10, 2), (14, 2))
    mine = torch.arange(8.0)[:, None].expand(8, 3).contiguous()
    found = pieces_of(mine, mine, cut)
    assert [piece.box.offsets for piece in found] == [(4, 0), (10, 0), (14, 0)]
    found[1].tensor.fill_(-1.0)  # the pieces are the storage itself
    assert mine[:, 0].tolist() == [0, 1, 2, 3, -1, -1, 6, 7]


@given(SHAPES, st.integers(1, 12))
def test_a_vocabulary_need_not_be_divisible(shape: tuple[int, int], degree: int) -> None:
    cuts = [cut_of(Placement("vocabulary", 0), shape, rank=r, degree=degree) for r in range(degree)]
    edges = [(0, 0)] if degree == 1 else [cut.segments[0] for cut in cuts]
    if degree > 1:
        assert edges[0][0] == 0 and edges[-1][0] + edges[-1][1] == shape[0]
        assert all(a + n == b for (a, n), (b, _) in itertools.pairwise(edges))
        assert max(n for _, n in edges) - min(n for _, n in edges) <= 1


def test_a_model_that_was_not_placed_says_so() -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: parallel.apply has not placed"):
        held(real_model("llama"))
