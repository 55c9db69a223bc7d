"""Rule: names in a manifest, an index, an archive or prepared data cannot leave their folder."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import saves
import torch
import xxhash
from safetensors.torch import save_file

from shoal.checkpoint.manifest import Manifest, Part
from shoal.checkpoint.store import Store
from shoal.data import fetch
from shoal.data.prepare import SourceSpec, open_prepared, prepare
from shoal.errors import CheckpointError, DataError, FetchError, ModelError
from shoal.models.huggingface import build_meta, read_config
from shoal.models.pretrained import PretrainedWeights
from shoal.untrusted import is_plain_name, open_plain

NAMES = [
    "../secret.safetensors",
    "/etc/secret.safetensors",
    "a/b.safetensors",
    "a\\b.safetensors",
    "..",
    ".",
    "",
    "x\0.safetensors",
    "x\n.safetensors",
    "\uff0e\uff0e/x.safetensors",
    "~root.safetensors",
    "c:x.safetensors",
    "x" * 256,
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_with_anything_but_a_name_in_it_is_none(name: str) -> None:
    assert not is_plain_name(name)


def test_plain_names_are_names() -> None:
    for name in ("model-00001-of-00002.safetensors", "rank-00000.safetensors", "a", ".hidden"):
        assert is_plain_name(name)


# --- manifests


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite a manifest, its checksum right: what an author of checkpoints can do."""
    body = json.loads((folder / "manifest.json").read_text())["body"]
    change(body)
    write_manifest(folder, json.dumps(body))


def write_manifest(folder: Path, body: str) -> None:
    """Any text as the body of a manifest, with the checksum that belongs to it."""
    rest = '",\n"body": ' + body + "}\n"
    head = '{"checksum": "'
    checksum = xxhash.xxh3_64((head + "0" * 16 + rest).encode()).hexdigest()
    (folder / "manifest.json").write_text(head + checksum + rest)


def test_the_forger_of_these_tests_is_believed(tmp_path: Path) -> None:
    saves.save(tmp_path, 1)
    forge(tmp_path / "step-00000001", lambda body: body["state"].update(forged=True))
    assert Store(tmp_path).verify(1).state["forged"] is True


@pytest.mark.parametrize("name", [*NAMES, "manifest.json", "x.json"], ids=ascii)
def test_a_manifest_names_files_of_its_folder_only(tmp_path: Path, name: str) -> None:
    """The file it leads to exists, has the right hash, and would be read without this rule."""
    home = tmp_path / "checkpoints"
    saves.save(home, 1)
    saves.save(home, 2)
    folder = home / "step-00000002"
    (home / "secret.safetensors").write_bytes((folder / "rank-00000.safetensors").read_bytes())

    def change(body: dict[str, Any]) -> None:
        body["files"][0]["file"] = name
        for entry in body["entries"]:
            if entry["file"] == "rank-00000.safetensors":
                entry["file"] = name

    forge(folder, change)
    said: list[str] = []
    assert Store(home).newest_good(on_bad=lambda _, why: said.append(why)) == 1
    assert said[0].startswith(f"{folder}/manifest.json: refused")
    with pytest.raises(CheckpointError):
        Store(home).open(2)


def test_a_report_of_a_part_is_held_to_the_same(tmp_path: Path) -> None:
    saves.save(tmp_path, 1)
    tree = Manifest.read(tmp_path / "step-00000001").part.to_json()
    assert Part.from_json(tree).files
    tree["files"][0]["file"] = "../x.safetensors"
    with pytest.raises(ValueError, match="cannot be a file of a checkpoint"):
        Part.from_json(tree)


def test_links_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    import os

    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    with open_plain(tmp_path / "file") as file:
        assert file.read() == b"x"
    for path in (tmp_path / "link", tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match=r"is a link|no regular file|Is a directory"):
            open_plain(path)


# --- a model folder


def model_of(folder: Path) -> Any:
    settings = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    config = read_config(architecture="llama", settings=settings, vocabulary_size=32)
    return build_meta(config, auto_class="AutoModelForCausalLM")


def write_indexed(folder: Path, name: str = "model-00001-of-00001.safetensors") -> None:
    """A model whose index names one file."""
    model = model_of(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = {n: torch.ones(p.shape) for n, p in model.named_parameters()}
    save_file(values, folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(values, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    write_indexed(folder, name=name)
    weights = (folder / "model-00001-of-00001.safetensors").read_bytes()
    (tmp_path / "secret.safetensors").write_bytes(weights)
    with pytest.raises(ModelError, match="which is not a file of this folder"):
        PretrainedWeights(folder, model=model_of(folder))


@pytest.mark.parametrize("single", [False, True], ids=["indexed", "single"])
def test_a_link_out_of_a_model_folder_is_refused(tmp_path: Path, single: bool) -> None:
    folder = tmp_path / "model"
    write_indexed(folder)
    (folder / "model-00001-of-00001.safetensors").rename(tmp_path / "secret.safetensors")
    name = "model.safetensors" if single else "model-00001-of-00001.safetensors"
    if single:
        (folder / "model.safetensors.index.json").unlink()
    (folder / name).symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(ModelError, match="which is not a file of this folder"):
        PretrainedWeights(folder, model=model_of(folder))


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    """models--x/snapshots/REVISION/FILE -> ../../blobs/HASH."""
    snapshot = tmp_path / "models--x/snapshots/abc"
    write_indexed(snapshot)
    (tmp_path / "models--x/blobs").mkdir()
    file = snapshot / "model-00001-of-00001.safetensors"
    file.rename(tmp_path / "models--x/blobs/0123")
    file.symlink_to("../../blobs/0123")
    source = PretrainedWeights(snapshot, model=model_of(snapshot))
    assert source.missing == ()
    tensor = source.tensor("model.norm.weight")
    assert tensor is not None and tensor.tolist() == [1.0] * 16


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000],
    ids=["empty", "list", "without", "no map", "no names", "deep"],
)
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    write_indexed(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="not the index of a model"):
        PretrainedWeights(tmp_path, model=model_of(tmp_path))


# --- archives and prepared data


@pytest.mark.parametrize("name", [n for n in NAMES if n.strip("\0") and "\0" not in n], ids=ascii)
def test_an_archive_unpacks_below_its_folder_only(tmp_path: Path, name: str) -> None:
    path = tmp_path / "tiny.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(zipfile.ZipInfo(name), "x")
        wheel.writestr("tiny/data.txt", "hello")
    if name == "a/b.safetensors":  # folders are what archives have
        fetch.unpack_wheel(path, into=tmp_path / "out", members=["*"])
        return
    with pytest.raises(FetchError, match="is a link or leaves the folder"):
        fetch.unpack_wheel(path, into=tmp_path / "out", members=["*"])
    assert not (tmp_path / "out").exists()


def prepared_at(folder: Path) -> Path:
    text = folder / "tales.txt"
    text.write_text("\n\n\n".join(f"tale {n} of the sea" for n in range(40)))

    def encode(records: list[Any]) -> list[dict[str, list[int]]]:
        return [{"input_ids": [ord(c) for c in record["text"]]} for record in records]

    return prepare(
        sources=[SourceSpec(source=str(text))],
        encode=encode,
        encode_key="characters",
        sequence_tokens=16,
        packing=True,
        validation_fraction=0.2,
        out=folder / "prepared",
    ).directory


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc", "..", "../mixture-0", "../source-0/x"])
def test_prepared_data_names_its_neighbours_only(tmp_path: Path, name: str) -> None:
    folder = prepared_at(tmp_path)
    path = folder / "description.json"
    about = json.loads(path.read_text())
    about["sources"][0]["directory"] = name
    path.write_text(json.dumps(about))
    with pytest.raises(DataError, match="which is no source beside it"):
        open_prepared(folder)


def test_prepared_data_names_files_of_its_folder_only(tmp_path: Path) -> None:
    folder = prepared_at(tmp_path)
    (source,) = folder.parent.glob("source-*")
    path = source / "description.json"
    about = json.loads(path.read_text())
    about["files"]["../../tales.txt"] = (tmp_path / "tales.txt").stat().st_size
    path.write_text(json.dumps(about))
    with pytest.raises(DataError, match="got no file"):
        open_prepared(folder)
