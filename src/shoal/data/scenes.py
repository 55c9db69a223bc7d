"""Scenes made of handwritten digits: one to four on a grey, noisy canvas, overlapping a little.

Made anew from the pinned images wherever they are read, by a generator with a fixed seed: the same
scenes on any machine. Scenes that are held out are made of other digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal.data.images import Record, Report, read_pixels

SIDE = 64
"""Pixels of a side of a scene."""

_SCALES = (0.7, 1.5)  # of a digit of 28 x 28 pixels
_MOST_OVERLAP = 0.25  # of the smaller of two boxes
_TRIES = 30  # places that are tried for a digit before the scene goes without it
_HELD_OUT = 5  # every so many-th digit is for scenes that are held out
_INK = 0.25  # of the darkest: what a box goes around

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def read_scenes(
    path: Path,
    *,
    count: int,
    held_out: bool,
    text_field: str | None = None,
    at: Report = lambda done: None,
) -> Iterator[Record]:
    """`{"image": uint8 [1, 64, 64], "boxes": [[left, top, right, bottom], ...], "labels": [...]}`.

    `path`: a table of pixels (images.read_pixels). Boxes are in pixels, around the ink.
    """
    draw = np.random.default_rng(int(held_out))
    digits = list(read_pixels(path, at=lambda done: at(done / 4)))
    kept = [each for n, each in enumerate(digits) if (n % _HELD_OUT == 0) == held_out]
    for number in range(count):
        if number % 200 == 0:
            at(0.25 + 0.75 * number / count)
        yield _scene(kept, draw)


def _scene(digits: list[Record], draw: np.random.Generator) -> Record:
    ink = np.zeros((SIDE, SIDE), dtype=np.float32)
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[str] = []
    for _ in range(int(draw.integers(1, 5))):
        digit = digits[int(draw.integers(len(digits)))]
        small = _resized(digit["image"][0], side=round(28 * draw.uniform(*_SCALES)))
        inside = _box_of(small)
        for left, top in draw.integers(0, SIDE - len(small) + 1, size=(_TRIES, 2)).tolist():
            across, down, right, bottom = inside
            box = (left + across, top + down, left + right, top + bottom)
            if all(overlap(box, other) <= _MOST_OVERLAP for other in boxes):
                place = ink[top : top + len(small), left : left + len(small)]
                np.maximum(place, small * np.float32(draw.uniform(0.6, 1)), out=place)
                boxes.append(box)
                labels.append(digit["label"])
                break
    ground = draw.uniform(30, 110)
    pixels = ground + ink * (250 - ground) + draw.normal(0, 18, ink.shape)
    image: Bytes = pixels.clip(0, 255).astype(np.uint8)
    return {"image": image[None], "boxes": [list(box) for box in boxes], "labels": labels}


def _resized(image: Bytes, *, side: int) -> Floats:
    """A square image in another size, 0 to 1, by linear interpolation between pixels."""
    size = len(image)
    at = ((np.arange(side) + 0.5) * size / side - 0.5).clip(0, size - 1)
    low = np.floor(at).astype(int)
    high, share = np.minimum(low + 1, size - 1), (at - low).astype(np.float32)
    values = image.astype(np.float32) / 255
    rows = values[low] * (1 - share[:, None]) + values[high] * share[:, None]
    found: Floats = rows[:, low] * (1 - share) + rows[:, high] * share
    return found


def _box_of(ink: Floats) -> tuple[int, int, int, int]:
    rows, columns = (np.flatnonzero((ink > _INK * ink.max()).any(axis=a)) for a in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def overlap(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """The area of what two boxes share, of the smaller one's."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return max(across, 0) * max(down, 0) / min(areas)


SCENES = partial(read_scenes, count=24000, held_out=False)
SCENES_HELD_OUT = partial(read_scenes, count=500, held_out=True)
