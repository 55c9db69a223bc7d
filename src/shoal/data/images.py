"""Readers of images: a table of pixels, and image files in a folder for each class."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.errors import DataError

Record = dict[str, Any]
Report = Callable[[float], None]

_LARGEST_TABLE_BYTES = 2**30
"""Of a table, unpacked: a few kilobytes may unpack to more than a machine has."""


def read_pixels(
    path: Path, *, text_field: str | None = None, at: Report = lambda done: None
) -> Iterator[Record]:
    """A gzipped table: a row per image, its grey pixels (0 to 255, row by row), then its class.

    Raises DataError for a row that is no square image, naming the line.
    """
    unpacked = 0
    try:
        with gzip.open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                unpacked += len(line)
                if unpacked > _LARGEST_TABLE_BYTES:
                    raise DataError(f"{path}: unpacks to more than 1 GiB; cut it into parts")
                yield _row(line, where=f"{path}: line {number}")
                if number % 1000 == 0:
                    at(min(0.99, number / 5000))
    except (OSError, EOFError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); expected a gzipped table of pixels. Delete it to "
            "fetch it again"
        ) from error
    at(1.0)


def _row(line: bytes, *, where: str) -> Record:
    try:
        values = [int(value) for value in line.split(b",")]
    except ValueError as error:
        raise DataError(f"{where}: expected whole numbers: {error}; remove that line") from error
    *pixels, label = values
    side = isqrt(len(pixels))
    if not pixels or side * side != len(pixels) or not 0 <= min(pixels) <= max(pixels) <= 255:
        raise DataError(
            f"{where}: expected the pixels of a square image (0 to 255) and its class, got "
            f"{len(pixels)} pixels from {min(pixels, default=0)} to {max(pixels, default=0)}; "
            "remove that line"
        )
    return {"image": np.array(pixels, dtype=np.uint8).reshape(1, side, side), "label": str(label)}


def read_image(
    path: Path, *, text_field: str | None = None, at: Report = lambda done: None
) -> Iterator[Record]:
    """One image file; its class is the name of its folder. Grey stays grey, all else is RGB.

    Raises DataError for a file that is no image.
    """
    pixels = _pixels(path)
    at(1.0)
    yield {"image": pixels, "label": path.parent.name}


def _pixels(path: Path) -> NDArray[np.uint8]:
    """An image file [C, H, W]. Raises DataError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            grey = image.mode in ("1", "L", "LA")
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}: is not an image that can be read: {error}; remove it, or save it again"
        ) from error
    return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, 2, 0))


def read_coco(
    path: Path, *, text_field: str | None = None, at: Report = lambda done: None
) -> Iterator[Record]:
    """`NAME.coco.json`: COCO's annotations of images that lie beside it or below its folder.

    `{"name", "image": uint8 [C, H, W], "boxes": [[left, top, right, bottom], ...], "labels"}` for
    each image, boxes in pixels. Raises DataError for a file of another form, or an image outside of
    its folder.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        names = {each["id"]: str(each["name"]) for each in tree["categories"]}
        found: dict[Any, list[tuple[list[float], str]]] = {
            each["id"]: [] for each in tree["images"]
        }
        for each in tree["annotations"]:
            left, top, width, height = each["bbox"]
            box = [left, top, left + width, top + height]
            found[each["image_id"]].append((box, names[each["category_id"]]))
        images = [(each["id"], str(each["file_name"])) for each in tree["images"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path}: expected annotations as COCO has them (images with id and file_name, "
            "annotations with image_id, category_id and bbox, categories with id and name), got "
            f"{type(error).__name__}: {error}"
        ) from error
    for number, (key, name) in enumerate(images):
        file = path.parent / name
        if not file.resolve().is_relative_to(path.parent.resolve()):
            raise DataError(
                f"{path}: the image {name[:80]!r} is outside of its folder; move it there"
            )
        boxes, labels = [box for box, _ in found[key]], [label for _, label in found[key]]
        yield {"name": name, "image": _pixels(file), "boxes": boxes, "labels": labels}
        at((number + 1) / len(images))
