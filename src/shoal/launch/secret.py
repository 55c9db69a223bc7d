"""The secret of a run over several hosts: a file of its own, which whoever needs it first makes."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from shoal.environment import secret_file
from shoal.errors import UserError

_BYTES = 32


def read_secret(given: Path | None) -> bytes:
    """The secret in the file `given`, or in that of SHOAL_KEYS; made where there is no such file.

    Raises UserError for a file that others can read, or that holds something else.
    """
    path = given or secret_file()
    if path is None:
        raise UserError(
            "--keys: expected the file with the secret that all hosts of the run share, got none\n"
            "    give a path on storage that all of them see; it is made where there is no file"
        )
    if not path.exists():
        _make(path)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077:
        mode = f"{stat.S_IMODE(status.st_mode):04o}"
        raise UserError(
            f"{path}: expected a file that only its owner can read (mode 0600), found mode {mode}\n"
            f"    chmod 600 {path}, or make another one"
        )
    try:
        found = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except (OSError, ValueError):
        found = b""
    if len(found) < _BYTES:
        raise UserError(
            f"{path}: expected {2 * _BYTES} hexadecimal digits, found something else\n"
            "    remove it, and it is made anew"
        )
    return found


def _make(path: Path) -> None:
    """Appears whole: two that make it at once end up with one."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(_BYTES) + "\n")
        with suppress(FileExistsError):
            os.link(beside, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be made: {error.strerror}") from None
    finally:
        with suppress(OSError):
            beside.unlink()
