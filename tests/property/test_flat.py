"""Flat layouts: each element of each tensor once, whatever the shapes and the number of ranks."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.flat import CHUNK, FlatLayout, Span, chunk_squares, ordered_sum

shapes = st.lists(st.integers(1, 40), max_size=3).map(tuple) | st.just((3, CHUNK - 7))


@st.composite
def regions(draw: st.DrawFn) -> dict[str, dict[str, tuple[int, ...]]]:
    """Matrices (never cut), other tensors, and an empty region."""
    found = {}
    for region in ("matrices", "decay", "plain", "frozen"):
        named = draw(st.lists(shapes, max_size=4))
        found[region] = {f"{region}.{index}": shape for index, shape in enumerate(named)}
    return found


@given(regions(), st.integers(1, 9))
def test_division_gives_each_element_once_and_cuts_no_matrix(
    named: dict[str, dict[str, tuple[int, ...]]], size: int
) -> None:
    layout = FlatLayout.of(named, whole=["matrices"])
    trainable = layout.regions["frozen"].start
    for numel in (layout.numel, trainable):
        spans = layout.divide(size, numel=numel)
        assert len(spans) == size
        assert [span.start for span in spans[1:]] == [span.stop for span in spans[:-1]]
        assert (spans[0].start, spans[-1].stop) == (0, numel)
        assert all(span.start % CHUNK == 0 for span in spans), "norms add up by whole chunks"
        for name in layout.members["matrices"]:
            start = layout.offsets[name]
            stop = start + prod(layout.shapes[name])
            owners = [span for span in spans if span.start < stop and start < span.stop]
            assert len(owners) <= 1


@given(regions())
def test_views_cover_their_elements_and_no_others(
    named: dict[str, dict[str, tuple[int, ...]]],
) -> None:
    layout = FlatLayout.of(named, whole=["matrices"])
    seen = torch.zeros(layout.numel, dtype=torch.int64)
    for region, members in named.items():
        for name, shape in members.items():
            view = layout.view(seen, name)
            assert tuple(view.shape) == shape
            view += 1
            start = layout.offsets[name]
            assert layout.regions[region].start <= start
            assert start + view.numel() <= layout.regions[region].stop
            assert start % 16 == 0, "aligned to 64 bytes"
    assert int(seen.max()) <= 1 if layout.numel else True
    assert int(seen.sum()) == sum(prod(s) for m in named.values() for s in m.values())


@given(regions(), st.integers(1, 7))
def test_a_norm_does_not_depend_on_the_division(
    named: dict[str, dict[str, tuple[int, ...]]], size: int
) -> None:
    layout = FlatLayout.of(named, whole=["matrices"])
    values = torch.randn(layout.numel, generator=torch.Generator().manual_seed(layout.numel))
    whole = ordered_sum(chunk_squares(values).tolist())
    parts: list[float] = []
    for span in layout.divide(size):
        parts += chunk_squares(values[span.start : span.stop]).tolist()
    assert ordered_sum(parts) == whole
    # float32 squares within a chunk, double precision between chunks
    assert whole == pytest.approx(float(values.double().square().sum()), rel=1e-5)


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="weight is given twice"):
        FlatLayout.of({"decay": {"weight": (2,)}, "plain": {"weight": (2,)}})


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_spans_meet_in_their_common_elements(a: int, b: int, c: int, d: int) -> None:
    first, second = Span(min(a, b), max(a, b)), Span(min(c, d), max(c, d))
    common = set(range(first.start, first.stop)) & set(range(second.start, second.stop))
    met = first.meet(second)
    assert set(range(met.start, met.stop) if met else ()) == common
