"""Rule: no size in a header is believed, and nothing allocated, before it agrees with the file."""

from __future__ import annotations

import io
import json
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import saves
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_paths import forge, write_manifest

from shoal.checkpoint.store import Store
from shoal.data import fetch
from shoal.errors import CheckpointError, FetchError
from shoal.untrusted import read_header


def file_of(folder: Path, header: Any, *, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header, told to be `length` bytes long."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: Any, at: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": at}


GOOD = {"a": entry([2], [0, 8]), "b": entry([], [8, 12]), "c": entry([0, 3], [8, 8])}


def test_a_good_header_is_read(tmp_path: Path) -> None:
    path = file_of(tmp_path, {"__metadata__": {"format": "pt"}, **GOOD}, data=bytes(12))
    with path.open("rb") as file:
        found = read_header(file)
    assert {name: info.shape for name, info in found.items()} == {"a": (2,), "b": (), "c": (0, 3)}


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    others = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    wanted = {str(dtype): torch.ones(3, 5).to(dtype) for dtype in (*floats, *others)}
    save_file(wanted, tmp_path / "x.safetensors", metadata={"note": "x"})
    with (tmp_path / "x.safetensors").open("rb") as file:
        assert {name: i.shape for name, i in read_header(file).items()} == dict.fromkeys(
            wanted, (3, 5)
        )


BAD: dict[str, Any] = {
    "four gigabytes of header": (b"{}", 4 << 30),
    "a header of 2**64": (b"{}", (1 << 64) - 1),
    "longer than the file": (b"{}", 3),
    "no JSON": b"\xff\xfe",
    "a list": [],
    "deep": b"[" * 200_000,
    "a number without end": b'{"a": ' + b"9" * 10_000 + b"}",
    "a name twice": b'{"a": 1, "a": 1}',
    "not an object": {"a": 1},
    "a field missing": {"a": {"dtype": "F32", "shape": [3]}},
    "a field more": {"a": {**entry([3], [0, 12]), "compressed": True}},
    "an unknown dtype": {"a": entry([3], [0, 12], "PICKLE")},
    "a dtype that is a list": {"a": entry([3], [0, 12], ["F32"])},
    "too long for its shape": {"a": entry([2], [0, 12])},
    "too short for its shape": {"a": entry([1 << 40], [0, 12])},
    "a negative size": {"a": entry([-3], [0, 12])},
    "sizes that multiply to nothing": {"a": entry([-1, -3], [0, 12])},
    "a fraction": {"a": entry([3.0], [0, 12])},
    "true": {"a": entry([True, 3], [0, 12])},
    "too many dims": {"a": entry([1] * 17 + [3], [0, 12])},
    "more elements than there are": {"a": entry([1 << 30] * 16, [0, 12])},
    "offsets turned": {"a": entry([3], [12, 0])},
    "three offsets": {"a": entry([3], [0, 6, 12])},
    "a hole at the start": {"a": entry([2], [4, 12])},
    "a hole at the end": {"a": entry([2], [0, 8])},
    "beyond the end": {"a": entry([4], [0, 16])},
    "shared bytes": {"a": entry([3], [0, 12]), "b": entry([2], [4, 12])},
    "the same bytes": {"a": entry([3], [0, 12]), "b": entry([3], [0, 12])},
}


@pytest.mark.parametrize("name", BAD)
def test_a_header_that_lies_is_refused(tmp_path: Path, name: str) -> None:
    header, length = BAD[name] if isinstance(BAD[name], tuple) else (BAD[name], None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = file_of(tmp_path, header, data=bytes(12), length=length)
    with path.open("rb") as file, pytest.raises(ValueError):
        read_header(file)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 << 10, f"{grown} KiB were allocated"


@given(st.binary(max_size=200))
def test_any_bytes_are_a_file_or_refused(content: bytes) -> None:
    import tempfile

    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            found = read_header(file)
        except ValueError:
            return
    assert sum(info.stop - info.start for info in found.values()) <= len(content)


def change_entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        body["entries"][0].update(changes)

    return change


def share_bytes(body: dict[str, Any]) -> None:
    """One saved box, claimed for a thousand places: a terabyte from a kilobyte."""
    first = body["entries"][0]
    first["shape"] = [2000, 6]
    for row in range(0, 2000, 2):
        box = {"offsets": [row, 0], "sizes": [2, 6]}
        body["entries"].append({**first, "box": box})


FORGED: dict[str, Callable[[dict[str, Any]], None]] = {
    "a box outside": change_entry(box={"offsets": [3, 0], "sizes": [2, 6]}),
    "a negative offset": change_entry(box={"offsets": [-2, 0], "sizes": [2, 6]}),
    "another rank": change_entry(box={"offsets": [0], "sizes": [2]}),
    "an unknown file": change_entry(file="other.safetensors"),
    "an endless shape": change_entry(shape=[1 << 40, 1 << 40]),
    "a text for a number": change_entry(shape=["4", "6"]),
    "shared bytes": share_bytes,
    "a field more": lambda body: body.update(files=[{**body["files"][0], "num_bytes": "1"}]),
    "a file twice": lambda body: body["files"].append(body["files"][0]),
    "no entries": lambda body: body.pop("entries"),
    "no step": lambda body: body.update(step=None),
    "a state that is a list": lambda body: body.update(state=[]),
    "no state": lambda body: body.update(state=None),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_manifest_that_lies_is_passed_over(tmp_path: Path, name: str) -> None:
    for step in (1, 2):
        saves.save(tmp_path, step)
    forge(tmp_path / "step-00000002", FORGED[name])
    said: list[str] = []
    assert Store(tmp_path).newest_good(on_bad=lambda _, why: said.append(why)) == 1
    assert "manifest.json: refused, it is not a manifest" in said[0]


@pytest.mark.parametrize("body", ["[" * 100_000, "9" * 10_000, "[]", "null", '{"format": 1}'])
def test_a_manifest_of_any_other_json_is_passed_over(tmp_path: Path, body: str) -> None:
    for step in (1, 2):
        saves.save(tmp_path, step)
    write_manifest(tmp_path / "step-00000002", body)
    said: list[str] = []
    assert Store(tmp_path).newest_good(on_bad=lambda _, why: said.append(why)) == 1
    assert "manifest.json: refused, it is not a manifest" in said[0]


def test_a_manifest_and_its_files_must_agree(tmp_path: Path) -> None:
    """The shape that the manifest gives a box is not the one in the file: read by neither."""
    saves.save(tmp_path, 1)
    folder = tmp_path / "step-00000001"

    def wider(body: dict[str, Any]) -> None:
        for each in body["entries"]:
            if each["name"] == "weight":
                each["shape"] = [4, 1 << 30]
                each["box"]["sizes"] = [2, 1 << 30]

    forge(folder, wider)
    with pytest.raises(CheckpointError, match=r"expected a box of \[2, 1073741824\], found F32"):
        Store(tmp_path).open(1).read("weight")
    saves.save(tmp_path, 1)

    def elsewhere(body: dict[str, Any]) -> None:
        for each in body["entries"]:
            each["key"] += " that is not there"

    forge(folder, elsewhere)
    with pytest.raises(CheckpointError, match="found nothing"):
        Store(tmp_path).open(1).read("weight")


def test_boxes_that_overlap_and_leave_a_hole(tmp_path: Path) -> None:
    """As many elements as asked for, but one row twice and another never."""
    saves.save(tmp_path, 1)

    def shift(body: dict[str, Any]) -> None:
        for each in body["entries"]:
            if each["name"] == "weight" and each["box"]["offsets"] == [2, 0]:
                each["box"]["offsets"] = [1, 0]

    forge(tmp_path / "step-00000001", shift)
    with pytest.raises(CheckpointError, match="its saved boxes overlap"):
        Store(tmp_path).open(1).read("weight")


# --- archives


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
    return path


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = archive(tmp_path / "bomb.whl", {"tiny/zeros": bytes(64 << 20)})
    assert path.stat().st_size < 100_000
    with pytest.raises(FetchError, match=r"bytes unpack to 67108864, which no honest package does"):
        fetch.unpack_wheel(path, into=tmp_path / "out", members=["*"])
    assert not (tmp_path / "out").exists()


def test_members_that_share_their_bytes_are_a_bomb_too(tmp_path: Path) -> None:
    """Many entries of the directory point at one stored member (D. Fifield's construction)."""
    path = tmp_path / "bomb.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny/a", bytes(range(256)) * 4096)
        first = wheel.infolist()[0]
        for number in range(40):
            again = zipfile.ZipInfo(f"tiny/{number}")
            again.header_offset = first.header_offset
            again.file_size, again.compress_size = first.file_size, first.compress_size
            again.CRC = first.CRC
            wheel.filelist.append(again)
            wheel.NameToInfo[again.filename] = again
    with pytest.raises(FetchError, match="which no honest package does"):
        fetch.unpack_wheel(path, into=tmp_path / "out", members=["*"])


def test_a_name_twice_and_too_many_names(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel, pytest.warns(UserWarning):
        wheel.writestr("tiny/a", "1")
        wheel.writestr("tiny/a", "2")
    with pytest.raises(FetchError, match="a name stands there twice"):
        fetch.unpack_wheel(tmp_path / "x.whl", into=tmp_path / "out", members=["*"])
    path = archive(tmp_path / "y.whl", {f"tiny/{n}": b"" for n in range(10_001)})
    with pytest.raises(FetchError, match="10,000 files"):
        fetch.unpack_wheel(path, into=tmp_path / "out", members=["*"])


def test_a_declared_size_that_is_not_the_real_one(tmp_path: Path) -> None:
    """The directory says 10 bytes; the member has 8 MiB of zeros."""
    path = archive(tmp_path / "x.whl", {"tiny/zeros": bytes(8 << 20)})
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", 10)
    with zipfile.ZipFile(io.BytesIO(content)) as wheel:
        assert wheel.infolist()[0].file_size == 10
    path.write_bytes(content)
    with pytest.raises(FetchError, match="damaged archive"):
        fetch.unpack_wheel(path, into=tmp_path / "out", members=["*"])
    sizes = [each.stat().st_size for each in (tmp_path / "out").rglob("*") if each.is_file()]
    assert all(size <= 10 for size in sizes)
