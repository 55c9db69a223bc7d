"""Objects of a store that is not a file system (S3 and its like), by fsspec. No torch.

What saves need of it: write an object, read it, list them, remove them; and create one that
nobody else has created, which decides who counts. Every failure is an OSError that says what was
done, where, and what the store had against it.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from shoal.checkpoint.files import Files

_S3: dict[str, Any] = {
    "use_listings_cache": False,
    # a store that is away is told after seconds, not after ten minutes; the next save tries again
    "config_kwargs": {"connect_timeout": 5, "retries": {"total_max_attempts": 3}},
}
EXCLUSIVE: dict[str, dict[str, Any]] = {
    "file": {"auto_mkdir": True},
    "memory": {},
    "s3": _S3,
    "s3a": _S3,
}
"""Protocols whose create-only is one act and was tried, with the options of their client. Others of
fsspec look whether the object is there, and then write: two who look at once would both count."""
ONE_PROCESS = ("memory",)
"""Of these, what no other process sees."""
PACKAGES = {"s3": "s3fs", "s3a": "s3fs"}
"""What speaks a protocol, where fsspec does not itself."""


def is_url(where: str) -> bool:
    """Whether `checkpoint.where` names an object store."""
    return "://" in where


class StoreError(OSError):
    """What a store had against it, in words."""

    def __init__(self, text: str, *, away: bool = False) -> None:
        """`away`: it did not say no; asked again it may do it."""
        super().__init__(errno.EIO, text)
        self.text, self.away = text, away

    def __str__(self) -> str:
        return self.text


class Objects:
    """The objects below one URL; names have `/` between their parts."""

    def __init__(self, url: str) -> None:
        """Nothing is asked yet."""
        self.url = url.rstrip("/")
        self.protocol = url.partition("://")[0]
        self._known: tuple[Any, str] | None = None

    # --- what is there

    def sizes(self) -> dict[str, int]:
        """Bytes of every object. Raises StoreError."""
        with self._doing("be listed"):
            fs, root = self._opened()
            found = fs.find(root, detail=True)
            at = len(root) + 1
            return {path[at:]: int(about["size"]) for path, about in found.items()}

    def read(self, name: str, *, most: int = 1 << 20) -> bytes:
        """An object, or the first `most` bytes of it. Raises FileNotFoundError, StoreError."""
        with self._doing("be read", name):
            fs, root = self._opened()
            content: bytes = fs.cat_file(f"{root}/{name}", start=0, end=most)
            return content

    def bring(self, name: str, path: Path, *, most: int, tell: Callable[[int], None]) -> None:
        """Copy an object to a new file; `tell`: called now and then with the bytes so far.

        Of one with more than `most` bytes not all is copied. Raises FileNotFoundError, StoreError;
        OSError for what the disk had against it.
        """
        done = 0
        with open(path, "xb") as file:
            for block in self._blocks(name):
                file.write(block)
                done += len(block)
                tell(done)
                if done > most:
                    return

    def _blocks(self, name: str) -> Iterator[bytes]:
        with self._doing("be read", name):
            fs, root = self._opened()
            opened = fs.open(f"{root}/{name}", "rb", block_size=1 << 23)
        with opened:
            while True:
                with self._doing("be read", name):
                    block = opened.read(1 << 23)
                if not block:
                    return
                yield block

    # --- what is made and goes

    def write(self, name: str, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
        """Write an object piece by piece; returns its size and xxh3 hash. Raises StoreError.

        It is there whole or not at all, but in a folder of this machine (file://).
        """
        digest, size = xxhash.xxh3_64(), 0
        with self._doing("be written", name):
            fs, root = self._opened()
            with fs.open(f"{root}/{name}", "wb") as file:
                for part in parts:
                    file.write(part)
                    digest.update(part)
                    size += len(part)
                if self.is_folder:
                    file.flush()
                    os.fsync(file.fileno())
        return size, digest.hexdigest()

    def create(self, name: str, content: bytes) -> None:
        """Write a small object if there is none of this name: of several who do it, one has.

        Raises FileExistsError for the others; StoreError.
        """
        with self._doing("be created", name):
            fs, root = self._opened()
            if not self.is_folder:
                fs.pipe_file(f"{root}/{name}", content, mode="create")
                return
            path, files = Path(f"{root}/{name}"), Files()
            files.make(path.parent)
            beside = Path(root) / f".{secrets.token_hex(8)}"  # it is never seen half written
            files.write(beside, [content])
            try:
                os.link(beside, path)
                files.flush(path.parent)
            finally:
                beside.unlink()

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects, in this order; what is gone already is no failure. Raises StoreError."""
        names = list(names)
        for name in names:
            with self._doing("be removed", name), suppress(FileNotFoundError):
                fs, root = self._opened()
                fs.rm_file(f"{root}/{name}")
        if self.is_folder:  # stores have no folders
            for folder in {Path(self._opened()[1]) / Path(name).parent for name in names}:
                with suppress(OSError):
                    folder.rmdir()

    def check(self) -> None:
        """Whether all of this works here: an object is created, read, listed and removed.

        Raises StoreError.
        """
        name, content = f"check-{secrets.token_hex(8)}", secrets.token_bytes(16)
        self.create(name, content)
        try:
            if self.read(name) != content or self.sizes().get(name) != len(content):
                raise StoreError(f"{self.url}: what is written there does not come back")
            with suppress(FileExistsError):
                self.create(name, b"")
                raise StoreError(
                    f"{self.url}: this store writes over an object that only may be created "
                    "(it leaves If-None-Match out of account), so that of two runs both would "
                    "count"
                )
        finally:
            self.remove([name])

    # --- fsspec

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of this machine (file://)."""
        return self.protocol == "file"

    def _opened(self) -> tuple[Any, str]:
        """The file system, and what its paths begin with."""
        if self._known is None:
            import fsspec  # most runs save to a folder

            fs, root = fsspec.url_to_fs(self.url, **EXCLUSIVE.get(self.protocol, {}))
            if self.protocol in PACKAGES:
                fs.retries = 2  # of what botocore has tried three times already
            self._known = fs, root.rstrip("/")
        return self._known

    @contextmanager
    def _doing(self, what: str, name: str = "") -> Iterator[None]:
        """Names what cannot be done, whatever a store's client raises."""
        try:
            yield
        except (FileExistsError, StoreError):
            raise
        except FileNotFoundError as error:
            if what == "be read" and name:
                raise
            raise self._failed(what, name, error, "there is no such bucket or folder") from None
        except PermissionError as error:
            raise self._failed(what, name, error, "no right to do so") from None
        except Exception as error:  # botocore's, aiohttp's, fsspec's: each client has its own
            raise self._failed(what, name, error, "") from None

    def _failed(self, what: str, name: str, error: Exception, why: str) -> StoreError:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        text = f"{why} ({said})" if why else said
        text = f"{self.url}{name and '/'}{name}: cannot {what}: {text}"
        return StoreError(text, away=not why)
