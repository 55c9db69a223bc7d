"""Boxes: what two share, and that any boxes of a tensor can be read from any saved ones."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.boxes import Box, Piece, Slot
from shoal.checkpoint.store import Store
from shoal.errors import CheckpointError

shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets = tuple(draw(st.integers(0, size - 1)) for size in shape)
    sizes = tuple(draw(st.integers(1, size - at)) for size, at in zip(shape, offsets))
    return Box(offsets, sizes)


def mask(box: Box | None, shape: tuple[int, ...]) -> torch.Tensor:
    seen = torch.zeros(shape, dtype=torch.bool)
    if box is not None:
        seen[box.within(Box.whole(shape))] = True
    return seen


def split(box: Box, draw: st.DataObject, *, depth: int) -> list[Box]:
    """`box` in parts that cover it once."""
    if depth == 0:
        return [box]
    dim = draw.draw(st.integers(0, len(box.sizes) - 1))
    if box.sizes[dim] == 1:
        return [box]
    cut = draw.draw(st.integers(1, box.sizes[dim] - 1))
    low = tuple(cut if d == dim else n for d, n in enumerate(box.sizes))
    high = tuple(n - cut if d == dim else n for d, n in enumerate(box.sizes))
    beyond = tuple(at + cut if d == dim else at for d, at in enumerate(box.offsets))
    parts = [Box(box.offsets, low), Box(beyond, high)]
    return [piece for part in parts for piece in split(part, draw, depth=depth - 1)]


@given(st.data(), shapes)
def test_boxes_meet_in_their_common_elements(draw: st.DataObject, shape: tuple[int, ...]) -> None:
    first, second = draw.draw(boxes_in(shape)), draw.draw(boxes_in(shape))
    common = mask(first, shape) & mask(second, shape)
    met = first.intersection(second)
    assert torch.equal(mask(met, shape), common)
    assert (met.numel if met else 0) == int(common.sum())


@given(st.data(), shapes)
def test_a_box_fits_where_its_elements_are(draw: st.DataObject, shape: tuple[int, ...]) -> None:
    box = draw.draw(boxes_in(shape))
    assert box.fits(shape) and box.slices == box.within(Box.whole(shape))
    value = torch.arange(float(Box.whole(shape).numel)).view(shape)
    assert value[box.slices].shape == box.sizes and value[box.slices].numel() == box.numel
    assert torch.equal(Slot(box, (0,) * len(shape)).of(value[box.slices]), value[box.slices])
    dim = draw.draw(st.integers(0, len(shape) - 1))
    beyond = tuple(n + shape[dim] if d == dim else n for d, n in enumerate(box.offsets))
    before = tuple(-1 if d == dim else n for d, n in enumerate(box.offsets))
    for outside in (Box(beyond, box.sizes), Box(before, box.sizes), Box.whole((*shape, 1))):
        assert not outside.fits(shape)


@settings(max_examples=30)
@given(st.data(), shapes)
def test_any_box_reads_back_from_any_saved_boxes(
    draw: st.DataObject, shape: tuple[int, ...]
) -> None:
    whole = Box.whole(shape)
    value = torch.arange(float(whole.numel)).view(shape)
    parts = split(whole, draw, depth=3)
    owners = [draw.draw(st.integers(0, 2)) for _ in parts]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        store.begin(1)
        saved = []
        for rank in range(3):
            pieces = [
                Piece("weight", "parameter", shape, box, value[box.within(whole)])
                for box, owner in zip(parts, owners)
                if owner == rank
            ]
            saved.append(store.write_part(1, rank=rank, pieces=pieces))
        store.publish(1, parts=saved, state={}, keep=1)
        store.verify(1)
        reader = store.open(1)
        assert torch.equal(reader.read("weight"), value)
        wanted = draw.draw(boxes_in(shape))
        assert torch.equal(reader.read("weight", box=wanted), value[wanted.within(whole)])


def test_a_hole_between_saved_boxes_is_an_error(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.begin(1)
    piece = Piece("weight", "parameter", (4, 2), Box((0, 0), (3, 2)), torch.ones(3, 2))
    store.publish(1, parts=[store.write_part(1, rank=0, pieces=[piece])], state={}, keep=1)
    reader = store.open(1)
    assert reader.read("weight", box=Box((1, 0), (2, 2))).tolist() == [[1.0, 1.0]] * 2
    with pytest.raises(CheckpointError, match="the saved boxes hold 6 of 8 elements asked for"):
        reader.read("weight")
