"""The few file operations a save is made of, in one place, so that each can be made to fail.

`Files` does them; `FaultyFiles` does them too, and dies or raises at a chosen one: tests kill a
save at every operation and assert that a checkpoint can still be loaded. `SlowFiles` takes time.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import xxhash


class Files:
    """File operations that reach the disk before they return."""

    def write(self, path: Path, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
        """Write `parts` to a new file and flush it to disk; returns its size and xxh3 hash."""
        digest, size = xxhash.xxh3_64(), 0
        with open(path, "xb") as file:
            for part in parts:
                self._about_to("write")
                file.write(part)
                digest.update(part)
                size += len(part)
            file.flush()
            self._about_to("fsync")
            os.fsync(file.fileno())
        return size, digest.hexdigest()

    def make(self, folder: Path) -> None:
        """Make a folder and its parents."""
        self._about_to("make")
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, path: Path, content: bytes) -> None:
        """Write a file that is there whole or not at all. For others to see now, not to last."""
        beside = path.with_name(f"{path.name}.new")
        self._about_to("write")
        beside.write_bytes(content)
        self._about_to("rename")
        os.rename(beside, path)

    def rename(self, source: Path, target: Path) -> None:
        """Give a folder its final name, and flush both the folder and its parent."""
        self.flush(source)
        self._about_to("rename")
        os.rename(source, target)
        self.flush(target.parent)

    def replace(self, source: Path, target: Path) -> None:
        """Give a file, which is on the disk, the name of another one, which goes."""
        self._about_to("rename")
        os.replace(source, target)
        self.flush(target.parent)

    def flush(self, folder: Path) -> None:
        """Flush the entries of a folder to disk."""
        self._about_to("fsync")
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def remove(self, path: Path) -> None:
        """Remove a folder and what is in it, or a file; of a link the link only."""
        self._about_to("remove")
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)

    def _about_to(self, operation: str) -> None:
        """Called before each operation; a place to fail."""


class SlowFiles(Files):
    """Takes `seconds` for each operation, as a network disk under load does."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def _about_to(self, operation: str) -> None:
        time.sleep(self.seconds)


class FaultyFiles(Files):
    """Fails before operation number `at` (from 0): `kill` ends the process, `full` and `io` raise.

    `count` is the number of operations seen, so that a first clean run tells how many there are.
    """

    def __init__(self, *, at: int | None = None, fault: str = "kill") -> None:
        self.count = 0
        self._at, self._fault = at, fault

    def _about_to(self, operation: str) -> None:
        here, self.count = self.count, self.count + 1
        if self._at is None or here < self._at:
            return
        if self._fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        number = errno.ENOSPC if self._fault == "full" else errno.EIO
        raise OSError(number, f"{os.strerror(number)} (planned, before {operation} {here})")
