"""Run directories: claim a new one, open an old one, hold one while a job runs in it."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from shoal.errors import RunError, nearest
from shoal.observe.events import read_lines

_LOCK = ".lock"
_NUMBER_BYTES = 32
"""Of its holder's number at the beginning of a lock; the host's name follows."""
NOTE = ".hosts"
"""What hosts of a run look for, to see that they share its folder."""
DISK = ".disk"
"""By which a host's own run folder is told from another host's."""
_MARKS = ("config.yaml", "metrics.jsonl", "checkpoints")


def claim(out: str | Path | None, *, name: str) -> Path:
    """A directory for a new run; by default the next free runs/NAME-NUMBER.

    Raises RunError when `out` holds a run (nothing is ever written over), is not empty, or cannot
    be written.
    """
    if out is None:
        return _next(Path("runs"), name=name)
    run = Path(out).expanduser()
    if any((run / mark).exists() for mark in _MARKS):
        raise RunError(
            f"{run}: already holds a run, which is not written over; go on with it by "
            f"'shoal resume {run}', or choose another --out"
        )
    # what was left behind by a kill is no file of anybody's; a lock that is held, `hold` tells
    if run.is_file() or (
        run.is_dir() and any(path.name not in (_LOCK, NOTE, DISK) for path in run.iterdir())
    ):
        raise RunError(f"{run}: expected a new or empty folder for the run, found other files")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_made(run, error) from None
    if not os.access(run, os.W_OK):
        raise RunError(f"{run}: cannot be written to; choose another --out")
    return run


def _next(base: Path, *, name: str) -> Path:
    """The next free BASE/NAME-NUMBER, made here: two runs started at once get two folders."""
    for number in itertools.count(1):
        run = base / f"{name}-{number:03d}"
        try:
            base.mkdir(parents=True, exist_ok=True)
            run.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise _not_made(run, error) from None
        return run
    raise AssertionError("numbers do not end")


def _not_made(run: Path, error: OSError) -> RunError:
    return RunError(f"{run}: cannot be made: {error.strerror}; choose another --out")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all. Raises OSError."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def is_run(folder: str | Path) -> bool:
    """Whether a run has begun in `folder`."""
    return (Path(folder).expanduser() / "config.yaml").is_file()


def open_run(run: str | Path) -> Path:
    """The directory of an existing run. Raises RunError."""
    folder = Path(run).expanduser()
    if is_run(folder):
        return folder
    if not folder.is_dir():
        beside = folder.parent
        runs = beside.glob("*/config.yaml") if beside.is_dir() else []
        names = [path.parent.name for path in runs]
        raise RunError(f"{folder}: no such run; {nearest(folder.name, names)}".rstrip("; "))
    raise RunError(f"{folder}: expected a run directory (with config.yaml), found none")


def requests_in(run: Path) -> list[str]:
    """Orders that a person has left in a run as the files STOP and SAVE; each is taken once."""
    found = [name for name in ("STOP", "SAVE") if (run / name).exists()]
    for name in found:
        (run / name).unlink(missing_ok=True)
    return found


def hosts_to_drain(run: Path) -> list[str]:
    """Hosts that a person wants the run to do without: names in the file DRAIN, taken once."""
    path = run / "DRAIN"
    try:
        names = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return []
    path.unlink(missing_ok=True)
    return names


def leave_request(run: Path, name: str, text: str = "") -> None:
    """Leave an order in a run: STOP, SAVE or DRAIN. Raises RunError where nobody would take it."""
    if not is_at_work(run):
        raise RunError(f"{run}: nobody is at work in this run, so there is nothing to ask for")
    write_whole(run / name, text)


def has_checkpoint(run: Path) -> bool:
    """Whether anything was saved."""
    return any((run / "checkpoints").glob("step-*"))


def last_saved(run: Path) -> str | None:
    """The name of the newest save that `run` has, or has told of; None: there is none."""
    found = sorted((run / "checkpoints").glob("step-*"))
    rows = [row for row in read_lines(run / "events.jsonl") if row.get("event") == "saved"]
    return found[-1].name.partition(".")[0] if found else str(rows[-1].get("at")) if rows else None


def anything_to_resume(run: Path, *, say: Callable[[str], None]) -> bool:
    """Whether `run` goes on from a save; one that ended before its first save begins anew, said.

    A run whose saves were removed does not: its rows and its model would be written over.
    """
    rows = (row for row in read_lines(run / "events.jsonl") if row.get("event") == "saved")
    saved = (row for row in rows if not row.get("generation"))  # else a registry says what counts
    if has_checkpoint(run) or any(saved):
        return True
    say("nothing was saved before it ended: beginning anew")
    return False


@contextmanager
def hold(run: Path) -> Iterator[None]:
    """Keep every other job out of `run`. The lock ends with this process, however it ends.

    Raises RunError at once, with the number of the process that holds it.
    """
    handle = _locked(run)
    try:
        os.ftruncate(handle, 0)
        who = f"{os.getpid():<{_NUMBER_BYTES - 1}}\n{socket.gethostname()}\n"
        os.pwrite(handle, who.encode(), 0)
        yield
    finally:
        (run / _LOCK).unlink(missing_ok=True)  # still locked: nobody can hold another one by now
        os.close(handle)


@contextmanager
def hold_if_free(run: Path) -> Iterator[None]:
    """As `hold`, or without where another holds it: then a registry says who counts, not a lock."""
    with ExitStack() as held:
        with suppress(RunError):
            held.enter_context(hold(run))
        yield


def is_at_work(run: Path) -> bool:
    """Whether a job runs in `run`, as far as this host can tell by its lock."""
    try:
        with (run / _LOCK).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
            return False
    except OSError:
        return False


def _locked(run: Path) -> int:
    """Descriptor of the lock file, locked (flock(2): it dies with its process, not before)."""
    path = run / _LOCK
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            text = os.pread(handle, 128, 0).decode(errors="replace")
            holder, host = text[:_NUMBER_BYTES].strip(), text[_NUMBER_BYTES:].strip()
            os.close(handle)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise RunError(f"{path}: cannot be locked: {error.strerror}") from None
            who = f"process {holder}" if holder.isdigit() else "another process"
            who += f" of {host}" if host not in ("", socket.gethostname()) else ""
            raise RunError(
                f"{run}: {who} is at work in this run; two jobs would overwrite each other's "
                "checkpoints. Wait for it, or stop it and resume, or start a new run with another "
                "--out"
            ) from None
        if _is_still(path, handle):
            return handle
        os.close(handle)  # its holder has just removed it


def _is_still(path: Path, handle: int) -> bool:
    """Whether `path` is the file that `handle` has open."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
