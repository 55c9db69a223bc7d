"""What comes from outside is checked before it is believed: names of files, sizes in headers.

A checkpoint, a model folder, an archive or prepared data may come from anybody. A name in one of
them never leads out of its folder, and no size in one of them is allocated before it agrees with
the bytes that are there. Raises ValueError and OSError; callers say whose file it is.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

LARGEST_HEADER_BYTES = 100 << 20
"""As safetensors itself limits it."""
MOST_TENSORS = 1 << 20
MOST_DIMS = 16
MOST_ELEMENTS = 1 << 48

_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}")

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
}


def is_plain_name(name: str) -> bool:
    """Whether `name` is a file's name and nothing else: no separator, no `..`, no odd character."""
    return _NAME.fullmatch(name) is not None and name not in (".", "..")


def open_plain(path: Path) -> BinaryIO:
    """Open a regular file for reading; a link, a pipe or a device is refused. Raises OSError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "is a link, expected a file", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return os.fdopen(handle, "rb")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Its first byte, counted from the end of the header."""
    stop: int


def read_header(file: BinaryIO) -> dict[str, TensorInfo]:
    """The header of a safetensors file (https://github.com/huggingface/safetensors#format).

    Raises ValueError unless every length, dtype, shape and offset agrees with the file's size, and
    the tensors cover the file exactly.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, LARGEST_HEADER_BYTES):
        raise ValueError(f"its header claims {length} bytes, the file has {size}")
    try:
        tree = json.loads(file.read(length), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not JSON as expected: {str(error)[:200]}") from None
    if not isinstance(tree, dict):
        raise ValueError("its header is not a JSON object")
    tree.pop("__metadata__", None)
    if len(tree) > MOST_TENSORS:
        raise ValueError(f"its header names {len(tree)} tensors, more than {MOST_TENSORS}")
    found = {name: _info(name, entry) for name, entry in tree.items()}
    at = 0
    for name, info in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if info.start != at:
            raise ValueError(f"{name[:80]!r} begins at byte {info.start}, expected {at}")
        at = info.stop
    if at != size - 8 - length:
        raise ValueError(f"its tensors take {at} bytes, the file has {size - 8 - length} for them")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a name stands there twice")
    return tree


def _info(name: str, entry: Any) -> TensorInfo:
    """One entry, its length as its dtype and shape say. Raises ValueError."""
    where = repr(name[:80])
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{where}: dtype {str(dtype)[:20]!r} is not known")
    if not _counts(shape) or len(shape) > MOST_DIMS or prod(shape) > MOST_ELEMENTS:
        raise ValueError(f"{where}: {str(shape)[:80]} is not the shape of a tensor")
    if not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{where}: {str(offsets)[:80]} are not two offsets")
    start, stop = offsets
    if stop - start != prod(shape) * _BITS[dtype] // 8:
        raise ValueError(f"{where}: {stop - start} bytes cannot hold {dtype} {shape}")
    return TensorInfo(dtype, tuple(shape), start, stop)


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
