"""Bytes and lines of files, of compressed ones too; every trouble names the file and the line."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, cast

from shoal.errors import DataError

Report = Callable[[float], None]
Errors = Literal["strict", "replace"]
PACKED = (".gz", ".zst")
"""Endings of compressed files; the ending before says what is inside."""

LARGEST_BYTES = 2**30
"""Of what is unpacked into memory at once, and of any line: a few kilobytes may unpack to more
than a machine has."""

_REPORT_EVERY = 1000


def ending_of(path: Path) -> str:
    """What says what a file holds, in lower case: `.csv` of `ROWS.CSV` and `rows.csv.gz`.

    Of a compressed file that says no more than that: both endings.
    """
    if path.suffix.lower() not in PACKED:
        return path.suffix.lower()
    return Path(path.stem).suffix.lower() or path.suffix.lower()


@contextmanager
def opened(path: Path) -> Iterator[tuple[io.BufferedReader, Callable[[], float]]]:
    """The bytes of a file, unpacked, and what says how much of it was read, 0 to 1.

    Raises DataError for a file that is missing, may not be read or is damaged.
    """
    try:
        size = max(path.stat().st_size, 1)
        with path.open("rb") as raw:
            yield _unpacked(raw, path.suffix.lower()), lambda: raw.tell() / size
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: is damaged or cut short ({error}); fetch it again") from error
    except OSError as error:
        if error.errno is None:  # pyarrow's, of what it cannot unpack
            raise DataError(f"{path}: cannot be unpacked ({error}); fetch it again") from error
        raise DataError(
            f"{path}: cannot be read: {error.strerror}; check its permissions"
        ) from error


def _unpacked(raw: io.BufferedReader, ending: str) -> io.BufferedReader:
    if ending == ".gz":
        return cast(io.BufferedReader, gzip.GzipFile(fileobj=raw))
    if ending == ".zst":
        import pyarrow  # comes with datasets; the standard library has no zstd before 3.14

        stream: IO[Any] = pyarrow.CompressedInputStream(raw, "zstd")
        return io.BufferedReader(cast(io.RawIOBase, stream))
    return raw


def unpacked_bytes(path: Path) -> bytes:
    """All of a compressed file. Raises DataError for more than `LARGEST_BYTES`, or damage."""
    with opened(path) as (file, _):
        content = file.read(LARGEST_BYTES + 1)
    if len(content) > LARGEST_BYTES:
        raise DataError(f"{path}: unpacks to more than 1 GiB; cut it into parts, or unpack it")
    return content


def lines_of(
    path: Path, *, at: Report = lambda done: None, errors: Errors = "strict"
) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of a UTF-8 file.

    Raises DataError for a file that is missing, empty, binary, or not UTF-8.
    """
    with opened(path) as (file, done):
        head = file.peek(4)[:4]
        if not head:
            raise DataError(f"{path}: is empty; expected text")
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{path}: is UTF-16, expected UTF-8; convert it with `iconv -t utf-8`")
        if head.startswith(b"\xef\xbb\xbf"):
            file.read(3)
        lines = iter(lambda: file.readline(LARGEST_BYTES), b"")
        for number, raw in enumerate(lines, start=1):
            if number % _REPORT_EVERY == 0:
                at(done())
            if len(raw) == LARGEST_BYTES:
                raise DataError(f"{path}: line {number} is longer than 1 GiB; cut it into parts")
            if b"\0" in raw:
                raise DataError(
                    f"{path}: is a binary file (a zero byte in line {number}); expected UTF-8 "
                    f"text, or a .parquet file"
                )
            try:
                yield number, raw.decode("utf-8", errors).rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}: line {number} is not UTF-8 (byte {error.start + 1} of the line is "
                    f"0x{raw[error.start]:02x}); convert it, e.g. `iconv -f latin1 -t utf-8`"
                ) from error
    at(1.0)
