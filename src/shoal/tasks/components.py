"""Finding objects without a model: bright parts that hang together, named by their neighbours.

What one would do with thresholds and a handful of lines: the baseline of object detection. numpy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_SIDE = 12  # pixels of a side of a cut-out that is compared
_NEIGHBOURS = 3
_SMALLEST = 12  # pixels of a component that counts

Image = NDArray[np.uint8]


class Components:
    """Cut-outs of known objects, and what they are."""

    def __init__(self, *, num_classes: int) -> None:
        self._num_classes = num_classes
        self._known: list[NDArray[np.float64]] = []
        self._labels: list[int] = []
        self._table: NDArray[np.float64] | None = None

    def learn(self, image: Image, boxes: NDArray[Any], labels: NDArray[Any]) -> None:
        """Remember the objects of an image [C, H, W]; boxes [M, 4] are corners in pixels."""
        for box, label in zip(boxes, labels):
            self._known.append(_cut_out(_smoothed(image), box))
            self._labels.append(int(label))

    def find(self, image: Image) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(boxes [N, 4] in pixels, share of the neighbours that is of each class [N, C])."""
        smooth = _smoothed(image)
        parts = components(smooth > _threshold(smooth))
        boxes = np.array([_box(part) for part in parts if len(part) >= _SMALLEST])
        boxes = boxes.reshape(-1, 4).astype(np.float64)
        chances = np.zeros((len(boxes), self._num_classes))
        if self._table is None:
            self._table = np.array(self._known)
        for row, box in enumerate(boxes):
            apart = np.square(self._table - _cut_out(smooth, box)).sum(axis=1)
            for near in np.argsort(apart, kind="stable")[:_NEIGHBOURS]:
                chances[row, self._labels[near]] += 1 / _NEIGHBOURS
        return boxes, chances


def components(bright: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Pixels [K, 2] of each part of a mask [H, W] that hangs together, corners included."""
    left = {(int(row), int(column)) for row, column in np.argwhere(bright)}
    found = []
    while left:
        edge = [left.pop()]
        part = list(edge)
        while edge:
            row, column = edge.pop()
            for near in ((row + a, column + b) for a in (-1, 0, 1) for b in (-1, 0, 1)):
                if near in left:
                    left.remove(near)
                    edge.append(near)
                    part.append(near)
        found.append(np.array(sorted(part)))
    return sorted(found, key=lambda part: tuple(part[0]))


def _smoothed(image: Image) -> NDArray[np.float64]:
    """Mean over channels and over 3 x 3 pixels [H, W]."""
    grey = np.pad(image.astype(np.float64).mean(axis=0), 1, mode="edge")
    height, width = image.shape[1:]
    parts = [grey[a : a + height, b : b + width] for a in range(3) for b in range(3)]
    found: NDArray[np.float64] = np.mean(parts, axis=0)
    return found


def _threshold(grey: NDArray[np.float64]) -> float:
    """The level that parts pixels best into two groups (Otsu, 1979)."""
    counts, edges = np.histogram(grey, bins=64)
    middles, below = (edges[1:] + edges[:-1]) / 2, np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * middles)
    means = sums / np.maximum(below, 1), (sums[-1] - sums) / np.maximum(above, 1)
    return float(edges[1:][np.argmax(below * above * np.square(means[0] - means[1]))])


def _box(part: NDArray[np.int64]) -> list[int]:
    (top, left), (bottom, right) = part.min(axis=0), part.max(axis=0) + 1
    return [int(left), int(top), int(right), int(bottom)]


def _cut_out(grey: NDArray[np.float64], box: NDArray[Any]) -> NDArray[np.float64]:
    """What a box holds, at one size, with mean 0 and length 1 [_SIDE**2]."""
    left, top, right, bottom = (float(each) for each in box)
    middles = (np.arange(_SIDE) + 0.5) / _SIDE
    rows = (top + middles * (bottom - top)).astype(int).clip(0, grey.shape[0] - 1)
    columns = (left + middles * (right - left)).astype(int).clip(0, grey.shape[1] - 1)
    values = grey[np.ix_(rows, columns)].ravel()
    values = values - values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-9)
