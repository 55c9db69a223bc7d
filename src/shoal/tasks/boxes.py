"""Boxes on images: their overlap, how found ones are matched to true ones, and average precision.

Shapes: [N, 4] boxes as (left, top, right, bottom), of one unit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MATCHED = 0.5
"""Intersection over union from which a found box is right (Pascal VOC, and mAP@0.5)."""

BINS = 2000
"""Steps of confidence by which found boxes are counted: sums of ranks, and precise to 0.0005."""


def corners(boxes: NDArray[np.floating]) -> Floats:
    """(middle x, middle y, width, height) -> (left, top, right, bottom)."""
    middle, half = boxes[..., :2].astype(np.float64), boxes[..., 2:].astype(np.float64) / 2
    return np.concatenate([middle - half, middle + half], axis=-1)


def intersection_over_union(one: Floats, other: Floats) -> Floats:
    """Of each pair of boxes [N, 4] and [M, 4]: [N, M]."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.prod((high - low).clip(min=0), axis=-1)
    area = [np.prod((each[:, 2:] - each[:, :2]).clip(min=0), axis=-1) for each in (one, other)]
    union = area[0][:, None] + area[1][None] - shared
    found: Floats = np.where(union > 0, shared / np.where(union > 0, union, 1), 0.0)
    return found


def right_ones(
    found: Floats, classes: Ints, scores: Floats, *, boxes: Floats, labels: Ints
) -> NDArray[np.bool_]:
    """Which found boxes of one image are right [N]: each true box is found once.

    The surest first: it takes the true box of its class that it covers best, if none has taken it
    before, and if that is enough (Everingham et al., The Pascal VOC challenge, 2010, section 4.2).
    """
    right, taken = np.zeros(len(found), dtype=bool), np.zeros(len(boxes), dtype=bool)
    overlaps = intersection_over_union(found, boxes)
    for number in np.argsort(-scores, kind="stable"):
        fits = np.where((labels == classes[number]) & ~taken, overlaps[number], -1.0)
        best = int(fits.argmax()) if len(fits) else -1
        if best >= 0 and fits[best] >= MATCHED:
            right[number] = taken[best] = True
    return right


def average_precision(right: Floats, wrong: Floats, *, total: float) -> float:
    """Area under precision by recall, of how many right and wrong boxes each confidence has.

    `right`, `wrong` [bins], the least sure first; `total` true boxes. Precision at a recall is the
    best of any higher one. NaN where there is no true box.
    """
    if not total:
        return float("nan")
    rights, wrongs = np.cumsum(right[::-1]), np.cumsum(wrong[::-1])
    precision = rights / np.maximum(rights + wrongs, 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    gained = np.diff(np.append(0.0, rights / total))
    return float((gained * precision).sum())
