"""Debian packages are fetched by the real apt-get, from a repository of one package that the test
builds; and their readers, on pages and recordings of the same form as the real ones."""

from __future__ import annotations

import gzip
import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from shoal.data import fetch
from shoal.data.audio import read_prompts, read_wave
from shoal.data.columns import content_hash
from shoal.data.help_pages import read_help_pages, read_translated_help
from shoal.errors import DataError, FetchError
from sounds import write_wave

needs_apt = pytest.mark.skipif(
    shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None,
    reason="no apt-get here",
)


def build_deb(folder: Path, *, version: str = "1.0", link: bool = False) -> Path:
    """The package shoal-tiny, whose script leaves a mark when it is run."""
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "usr/share/tiny/deep").mkdir(parents=True)
    (tree / "usr/share/tiny/a.txt").write_text("hello")
    (tree / "usr/share/tiny/deep/b.txt").write_text("world")
    (tree / "usr/share/tiny/code.py").write_text("boom")
    if link:
        (tree / "usr/share/tiny/c.txt").symlink_to("/etc/passwd")
    control = {"Package": "shoal-tiny", "Version": version, "Architecture": "all"}
    control |= {"Maintainer": "nobody <nobody@localhost>", "Description": "a test"}
    lines = "".join(f"{name}: {value}\n" for name, value in control.items())
    (tree / "DEBIAN/control").write_text(lines)
    script = tree / "DEBIAN/preinst"
    script.write_text(f"#!/bin/sh\ntouch {folder}/run\n")
    script.chmod(0o755)
    path = folder / f"shoal-tiny_{version}_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(tree), str(path)], check=True, capture_output=True)
    size, digest = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "Packages").write_text(
        f"{lines}Filename: {path.name}\nSize: {size}\nSHA256: {digest}\n"
    )
    return path


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that apt-get takes for its only source; its own lists know nothing of it yet."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "sources.list").write_text(f"deb [trusted=yes] file:{folder} ./\n")
    state = tmp_path / "state"
    for name in ("lists/partial", "archives/partial"):
        (state / name).mkdir(parents=True)
    settings = {
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": folder / "none",
        "Dir::State": state,
        "Dir::Cache": state,
    }
    lines = "".join(f'{name} "{value}";\n' for name, value in settings.items())
    (folder / "apt.conf").write_text(lines)
    monkeypatch.setenv("APT_CONFIG", str(folder / "apt.conf"))
    return folder


def tree_of(folder: Path) -> str:
    """As the docstring of tree_sha256 says, by a shell."""
    command = "find * -type f | LC_ALL=C sort | xargs sha256sum | sha256sum"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, check=True)
    return done.stdout.split()[0].decode()


@needs_apt
def test_a_package_is_fetched_and_pinned_by_its_files(repository: Path, cache: Path) -> None:
    build_deb(repository)
    expected = repository / "expected/usr/share/tiny"
    shutil.copytree(repository / "tree/usr/share/tiny", expected)
    (expected / "code.py").unlink()
    asked = {
        "requirement": "shoal-tiny",
        "sha256": tree_of(repository / "expected"),
        "members": ["usr/share/tiny/*.txt"],
        "origin": "debian",
    }
    target = cache / "packages" / "tiny"
    said: list[str] = []
    fetch.fetch(**asked, directory=target, announce=said.append)  # type: ignore[arg-type]
    assert (target / "usr/share/tiny/a.txt").read_text() == "hello"
    assert (target / "usr/share/tiny/deep/b.txt").read_text() == "world"
    assert not (target / "usr/share/tiny/code.py").exists(), "it was not asked for"
    assert not (repository / "run").exists(), "its script was not run"
    assert re.search(r"shoal-tiny: asking for new lists.*Unable to locate package", said[0])
    assert fetch.problem(target) is None
    assert [path.name for path in target.parent.iterdir()] == ["tiny"], "nothing else is left"

    build_deb(repository, version="1.1")  # an update with the same files is the same
    shutil.rmtree(target)
    fetch.fetch(**asked, directory=target)  # type: ignore[arg-type]
    assert fetch.problem(target) is None
    shutil.rmtree(target)
    with pytest.raises(FetchError, match=r"shoal-tiny: the package is not the pinned one"):
        fetch.fetch(**{**asked, "members": ["*"]}, directory=target)  # type: ignore[arg-type]
    assert list(target.parent.iterdir()) == []


@needs_apt
def test_a_package_that_apt_cannot_give(repository: Path, tmp_path: Path) -> None:
    build_deb(repository)
    with pytest.raises(FetchError, match=r"shoal-none: expected it from.*Unable to locate package"):
        fetch.download_debian("shoal-none", into=tmp_path / "a")
    with pytest.raises(FetchError, match=r"Version '2.0' for 'shoal-tiny' was not found"):
        fetch.download_debian("shoal-tiny=2.0", into=tmp_path / "b")


@needs_apt
def test_links_and_damage_are_refused(repository: Path, tmp_path: Path) -> None:
    path = build_deb(repository, link=True)
    with pytest.raises(FetchError, match=r"'usr/share/tiny/c.txt' is a link"):
        fetch.unpack_debian(path, into=tmp_path / "out", members=["*.txt"])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(FetchError, match=r"expected a .deb, got a damaged archive"):
        fetch.unpack_debian(path, into=tmp_path / "out", members=["*.txt"])
    assert not (tmp_path / "out").exists()


def test_a_machine_without_apt_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match=r"shoal-tiny: is a Debian package; expected apt-get.*own"):
        fetch.download_debian("shoal-tiny", into=tmp_path)


def write_page(path: Path, *paragraphs: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "\n".join(f"<p class='x'>{each}</p>" for each in paragraphs)
    path.write_text(
        f'<html><head><p>not this</p></head><body><p>nor this</p><div id="DisplayArea">'
        f"<h1>Title &amp; more</h1>{body}</div></body></html>",
        encoding="utf-8",
    )


def test_help_pages_are_read_and_paired(tmp_path: Path) -> None:
    english, spanish = tmp_path / "en-US", tmp_path / "es"
    write_page(english / "text/a.html", "One two <b>three</b> four", "Same in both of them", "x y")
    write_page(spanish / "text/a.html", "Uno dos tres cuatro", "Same in both of them", "z")
    write_page(english / "text/b.html", "One two three four", "five six seven eight")
    write_page(spanish / "text/b.html", "Uno dos tres cuatro", "cinco seis")
    write_page(english / "text/c.html", "one more paragraph here than there", "this one")
    write_page(spanish / "text/c.html", "uno")
    pages = list(read_help_pages(english))
    assert [page["page"] for page in pages] == ["text/a.html", "text/b.html", "text/c.html"]
    assert pages[0]["title"] == "Title & more"
    assert pages[0]["text"].splitlines()[1] == "One two three four"
    pairs = list(read_translated_help(spanish))
    assert [(pair["source"], pair["target"]) for pair in pairs] == [
        ("One two three four", "Uno dos tres cuatro"),
        ("five six seven eight", "cinco seis"),
    ]
    assert content_hash(pairs[0]) != content_hash(pairs[1]), "of other pages"
    again = {**pairs[0], "source": "another"}
    assert content_hash(again) == content_hash(pairs[0]), "of one page"


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_recordings_of_any_width_are_read(tmp_path: Path, width: int) -> None:
    half = 2 ** (8 * width - 2)
    whole = np.array([0, half, -half, half // 2, -2 * half, 2 * half - 1])
    write_wave(tmp_path / "a.wav", whole, rate=8000, width=width)
    samples, rate = read_wave(tmp_path / "a.wav")
    assert rate == 8000
    # a step of the width, or of float32
    assert np.allclose(samples, [0, 0.5, -0.5, 0.25, -1, 1], atol=max(2.0 ** (1 - 8 * width), 1e-7))
    write_wave(tmp_path / "two.wav", whole, rate=16000, width=width, channels=2)
    both, _ = read_wave(tmp_path / "two.wav")
    assert np.allclose(both, samples.reshape(-1, 2).mean(axis=1))


def test_what_is_no_recording_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF not sound")
    with pytest.raises(DataError, match=r"a.wav: expected a .wav file of plain PCM.*ffmpeg"):
        read_wave(path)
    with pytest.raises(DataError, match=r"none.wav: expected a .wav file.*No such file"):
        read_wave(tmp_path / "none.wav")
    write_wave(path, np.array([], dtype=np.int64), rate=8000, width=2)
    with pytest.raises(DataError, match=r"a.wav: expected sound, got a file without samples"):
        read_wave(path)


def test_prompts_have_their_words(tmp_path: Path) -> None:
    voice = tmp_path / "usr/share/asterisk/sounds/en"
    for name in ("digits/7", "beep", "letters/at", "unknown"):
        write_wave(voice / f"{name}.wav", np.arange(40), rate=8000, width=2)
    listed = tmp_path / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    listed.parent.mkdir(parents=True)
    lines = [";a comment: of the list", "", "digits/7: seven", "beep: [a tone]"]
    lines += ["letters/at: at [@]", "missing: nobody recorded this", "joined: <beep>"]
    listed.write_bytes(gzip.compress("\n".join(lines).encode()))
    found = list(read_prompts(voice))
    assert [record["text"] for record in found] == ["seven", "at"]
    assert all(record["rate"] == 8000 and len(record["audio"]) == 40 for record in found)
