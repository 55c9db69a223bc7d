"""Checkpoints on disk: what goes in comes out, by name and box; other tools can read the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from shoal.boxes import Box, Piece
from shoal.checkpoint.manifest import NAME, Manifest, Part
from shoal.checkpoint.store import Store
from shoal.errors import CheckpointError

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
]


def piece(name: str, tensor: torch.Tensor, *, kind: str = "parameter") -> Piece:
    shape = tuple(tensor.shape)
    return Piece(name, kind, shape, Box.whole(shape), tensor)


def save(store: Store, step: int, *pieces: Piece, keep: int = 9) -> Path:
    store.begin(step)
    part = store.write_part(step, rank=0, pieces=pieces)
    return store.publish(step, parts=[part], state={"note": "snow\u2603"}, keep=keep)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_format_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.arange(12).view(3, 4).to(dtype)
    store = Store(tmp_path)
    where = save(store, 1, piece("weight", value.t()))  # not contiguous
    found = store.open(1).read("weight")
    assert found.dtype == dtype and torch.equal(found, value.t())
    other = load_file(where / "rank-00000.safetensors")["parameter/weight"]
    assert torch.equal(other, value.t()), "an ordinary safetensors file"


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    store = Store(tmp_path)
    save(store, 1, piece("scalar", torch.tensor(2.5)), piece("vector", torch.tensor([1.0])))
    reader = store.open(1)
    assert reader.read("scalar").item() == 2.5
    assert reader.shape("scalar") == ()


def test_names_kinds_and_state(tmp_path: Path) -> None:
    store = Store(tmp_path)
    save(store, 7, piece("a", torch.ones(2)), piece("a", torch.zeros(2), kind="exp_avg"))
    reader = store.open(7)
    assert (reader.step, reader.state) == (7, {"note": "snow\u2603"})
    assert reader.names() == ["a"] and reader.names("exp_avg") == ["a"]
    assert reader.read("a").tolist() == [1.0, 1.0]
    assert reader.read("a", kind="exp_avg").tolist() == [0.0, 0.0]
    with pytest.raises(CheckpointError, match="holds no momentum_buffer of a"):
        reader.read("a", kind="momentum_buffer")


def test_a_rank_may_have_nothing_to_write(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.begin(1)
    part = store.write_part(1, rank=0, pieces=[piece("a", torch.ones(2))])
    assert store.write_part(1, rank=1, pieces=[]) == Part()
    store.publish(1, parts=[part, Part()], state={}, keep=1)
    store.verify(1)
    assert sorted(p.name for p in store.path(1).iterdir()) == [NAME, "rank-00000.safetensors"]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step in range(1, 6):
        save(store, step, piece("a", torch.ones(2)), keep=2)
    assert store.steps() == [4, 5]


def test_other_folders_are_no_checkpoints(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.steps() == []
    save(store, 3, piece("a", torch.ones(2)))
    for name in ("step-3", "step-00000009.bak", ".step-00000010.writing", "notes"):
        (tmp_path / name).mkdir()
    assert store.steps() == [3]


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    save(store, 1, piece("a", torch.zeros(2)))
    save(store, 1, piece("a", torch.ones(2)))
    store.verify(1)
    assert store.open(1).read("a").tolist() == [1.0, 1.0]


def test_a_manifest_of_another_format_names_the_way_out(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = save(store, 1, piece("a", torch.ones(2))) / NAME
    text = path.read_text().replace('"format": 1', '"format": 2')
    checksum = json.loads(text)["checksum"]
    blank = text.replace(checksum, "0" * 16)
    path.write_text(text.replace(checksum, xxhash.xxh3_64(blank.encode()).hexdigest()))
    with pytest.raises(CheckpointError, match="expected format 1, got 2; read it with the version"):
        Manifest.read(store.path(1))


def test_a_manifest_is_json(tmp_path: Path) -> None:
    path = save(Store(tmp_path), 1, piece("a", torch.ones(2))) / NAME
    body = json.loads(path.read_text())["body"]
    (entry,) = body["entries"]
    assert entry["name"] == "a" and entry["box"] == {"offsets": [0], "sizes": [2]}
