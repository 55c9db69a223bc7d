"""Checkpoints: whatever boxes a state was written in, any other boxes read the same bits."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.boxes import Box, Piece
from shoal.checkpoint.store import Store
from shoal.errors import CheckpointError

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int64, torch.uint8)
KINDS = ("parameter", "exp_avg")


@dataclass(frozen=True)
class Given:
    """A tensor, and one way of cutting it."""

    name: str
    kind: str
    value: torch.Tensor
    boxes: list[Box]


def cut(draw: st.DrawFn, box: Box, *, times: int) -> list[Box]:
    """Parts that cover `box` once."""
    if times == 0 or max(box.sizes, default=1) == 1:
        return [box]
    dim = draw(st.sampled_from([d for d, n in enumerate(box.sizes) if n > 1]))
    at = draw(st.integers(1, box.sizes[dim] - 1))
    low = tuple(at if d == dim else n for d, n in enumerate(box.sizes))
    high = tuple(n - at if d == dim else n for d, n in enumerate(box.sizes))
    beyond = tuple(o + at if d == dim else o for d, o in enumerate(box.offsets))
    parts = (Box(box.offsets, low), Box(beyond, high))
    return [piece for part in parts for piece in cut(draw, part, times=times - 1)]


@st.composite
def states(draw: st.DrawFn) -> list[Given]:
    """Up to four tensors of any dtype and shape, bits at random, each cut anyhow."""
    found = []
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
        dtype = draw(st.sampled_from(DTYPES))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        width = torch.empty(0, dtype=dtype).element_size()
        raw = torch.randint(256, (*shape, width), dtype=torch.uint8, generator=generator).reshape(
            -1
        )
        value = raw.view(dtype).view(shape)
        boxes = cut(draw, Box.whole(shape), times=draw(st.integers(0, 3)))
        found.append(Given(f"layer.{number // 2}", KINDS[number % 2], value, boxes))
    return found


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """NaN is equal to itself here."""
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(*raw)


def write(folder: str, state: list[Given], *, size: int, draw: st.DataObject) -> Store:
    store = Store(Path(folder))
    store.begin(1)
    pieces: list[list[Piece]] = [[] for _ in range(size)]
    for each in state:
        for box in each.boxes:
            part = each.value[box.within(Box.whole(each.value.shape))]
            owner = draw.draw(st.integers(0, size - 1))
            shape = tuple(each.value.shape)
            pieces[owner].append(Piece(each.name, each.kind, shape, box, part))
    parts = [store.write_part(1, rank=rank, pieces=own) for rank, own in enumerate(pieces)]
    store.publish(1, parts=parts, state={}, keep=1)
    return store


@settings(max_examples=25)
@given(st.data(), states())
def test_any_boxes_read_what_any_boxes_wrote(draw: st.DataObject, state: list[Given]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = write(folder, state, size=draw.draw(st.integers(1, 4)), draw=draw)
        store.verify(1)
        reader = store.open(1)
        for each in state:
            whole = Box.whole(each.value.shape)
            assert same_bits(reader.read(each.name, kind=each.kind), each.value)
            again = torch.empty_like(each.value)
            others = draw.draw(st.composite(lambda d, w=whole: cut(d, w, times=3))())
            for box in others:
                found = reader.read(each.name, kind=each.kind, box=box)
                assert same_bits(found, each.value[box.within(whole)])
                again[box.within(whole)] = found
            assert same_bits(again, each.value)


@settings(max_examples=20)
@given(st.data(), states())
def test_a_lost_box_is_never_made_up(draw: st.DataObject, state: list[Given]) -> None:
    """One saved box is left out: what touches it is an error, the rest reads as before."""
    lost = draw.draw(st.sampled_from([(each, box) for each in state for box in each.boxes]))
    kept = [each for each in state if each is not lost[0]]
    rest = [box for box in lost[0].boxes if box is not lost[1]]
    kept.append(Given(lost[0].name, lost[0].kind, lost[0].value, rest))
    with tempfile.TemporaryDirectory() as folder:
        reader = write(folder, kept, size=2, draw=draw).open(1)
        name, kind, value = lost[0].name, lost[0].kind, lost[0].value
        with pytest.raises(CheckpointError):
            reader.read(name, kind=kind)
        with pytest.raises(CheckpointError):
            reader.read(name, kind=kind, box=lost[1])
        for box in rest:
            found = reader.read(name, kind=kind, box=box)
            assert same_bits(found, value[box.within(Box.whole(value.shape))])
