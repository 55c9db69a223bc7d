"""Readers of images: every pixel and class as PIL and numpy have them; what is none is named."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shoal.data.images import read_pixels
from shoal.data.sources import content_key, read_records
from shoal.errors import DataError


def write_table(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()))
    return path


def test_a_table_of_pixels(tmp_path: Path) -> None:
    rows = [[0, 50, 100, 255, 7], [1, 2, 3, 4, 0]]
    path = write_table(tmp_path / "p.csv.gz", "\n".join(",".join(map(str, r)) for r in rows))
    done: list[float] = []
    found = list(read_pixels(path, at=done.append))
    assert [each["label"] for each in found] == ["7", "0"] and done == [1.0]
    assert found[0]["image"].dtype == np.uint8
    assert found[0]["image"].tolist() == [[[0, 50], [100, 255]]]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("1,2,3,4,a", "line 2: expected whole numbers: .*'?a"),
        ("1,2,3,9", "line 2: expected the pixels of a square image .* got 3 pixels from 1 to 3"),
        ("1,2,3,256,9", "got 4 pixels from 1 to 256; remove that line"),
        ("9", "got 0 pixels from 0 to 0"),
    ],
)
def test_a_line_that_is_no_image_is_named(tmp_path: Path, line: str, expected: str) -> None:
    path = write_table(tmp_path / "p.csv.gz", f"1,2,3,4,5\n{line}\n")
    with pytest.raises(DataError, match=expected):
        list(read_pixels(path))


def test_a_table_that_is_cut_short_or_unpacks_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_table(tmp_path / "p.csv.gz", "1,2,3,4,5\n" * 1000)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(DataError, match="expected a gzipped table of pixels"):
        list(read_pixels(path))
    path.write_bytes(whole)
    monkeypatch.setattr("shoal.data.images._LARGEST_TABLE_BYTES", 5000)
    with pytest.raises(DataError, match="unpacks to more than"):
        list(read_pixels(path))


def write_classes(folder: Path) -> Path:
    """Grey and coloured images in a folder for each class."""
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            pixels = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "animals")
    found = list(read_records(str(folder)))
    assert [each["label"] for each in found] == ["cat", "dog"] * 3, "in turns"
    wanted = np.asarray(Image.open(folder / "dog" / "1.png"))
    assert np.array_equal(found[3]["image"], wanted.transpose(2, 0, 1))
    before = content_key(str(folder))
    (folder / "dog").rename(folder / "wolf")
    assert content_key(str(folder)) != before, "a class's name is part of the data"


def test_grey_images_stay_grey(tmp_path: Path) -> None:
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (found,) = read_records(str(tmp_path / "a.png"))
    assert np.array_equal(found["image"], pixels[None])


def test_a_file_that_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image at all")
    with pytest.raises(DataError, match=r"a.png: is not an image that can be read"):
        list(read_records(str(tmp_path / "a.png")))


def test_a_class_folder_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    outside = write_classes(tmp_path / "outside")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cat").symlink_to(outside / "cat")
    with pytest.raises(DataError, match="outside its folder"):
        list(read_records(str(tmp_path / "mine")))
