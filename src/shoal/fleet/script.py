"""`shoal run`: a script of the user's on several workers of this machine, each of which may join.

The workers come from the fork server, which has imported torch already. Worker 0 prints; what the
others print is dropped, but for errors: the first to fail is named with its traceback, and ends
the rest.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.environment import become_worker
from shoal.errors import PeersLost, RunError, ShoalError, UserError, WorkerError
from shoal.launch.pool import Worker, WorkerPool

_TARGET = "shoal.fleet.script:work"
_GRACE_SECONDS = 3.0
"""After a failure the others may still say what they saw before they are ended."""


def run_script(
    script: str | Path, arguments: Sequence[str] = (), *, workers: int, pool: WorkerPool
) -> int:
    """Run a script on `workers` workers to its end; the exit status it asked for.

    Raises RunError for a script that is not there, what the script raised if that is a ShoalError,
    WorkerError with the traceback for anything else.
    """
    path = Path(script)
    if not path.is_file():
        raise RunError(f"{path}: no such script; expected a file of Python")
    with tempfile.TemporaryDirectory(prefix="shoal-") as scratch:
        meeting = (Path(scratch) / "meeting").as_uri()
        payload = {
            "script": str(path.resolve()),
            "arguments": list(arguments),
            "size": workers,
            "folder": os.getcwd(),  # the fork server may have been started in another
        }
        started = [
            pool.start(_TARGET, {**payload, "rank": rank, "meeting": meeting})
            for rank in range(workers)
        ]
        try:
            error = _watch(started, pool)
        finally:
            pool.kill([worker for worker in started if worker.status is None])
    if error is not None:
        raise error
    return next((one.status for one in started if one.status), 0)


def _watch(started: list[Worker], pool: WorkerPool) -> ShoalError | None:
    """Hear the workers until all have ended, or one has failed and the others had their time.

    What ended them: an error, else a signal, else the loss of another worker.
    """
    errors: list[dict[str, Any]] = []
    killed: list[str] = []
    until: float | None = None
    while not all(one.told for one in started):
        for one, message in pool.events(timeout_seconds=0.2, only=started):
            if message is not None and "error" in message:
                errors.append(message)
            elif message is None and one in started and (one.status or 0) < 0:
                name = signal.Signals(-(one.status or 0)).name
                killed.append(f"worker {started.index(one)} was ended by {name}")
        if until is None and (errors or any(one.status for one in started)):
            until = time.monotonic() + _GRACE_SECONDS
        if until is not None and time.monotonic() > until:
            pool.kill([one for one in started if one.status is None])
    causes = [each for each in errors if not each["lost"]]
    if killed and not causes:
        return WorkerError(f"{killed[0]}; nothing restarts a script")
    return _described((causes or errors)[0]) if errors else None


def _described(error: dict[str, Any]) -> ShoalError:
    if error["user"]:
        return UserError(error["error"])
    return WorkerError(f"worker {error['rank']}: {error['error']}\n{error['trace'].rstrip()}")


def work(payload: dict[str, Any], report: int) -> int:
    """Entry point of a worker: the script as the main program; its exit status."""
    rank, script = int(payload["rank"]), payload["script"]
    become_worker(rank, size=int(payload["size"]), meeting=payload["meeting"])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    if rank:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.chdir(payload["folder"])
    sys.argv = [script, *payload["arguments"]]
    sys.path[0:0] = [str(Path(script).parent)]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as leave:
        if leave.code is None or isinstance(leave.code, int):
            return leave.code or 0
        _tell(report, rank=rank, error=UserError(str(leave.code)))
        return 1
    except BaseException as error:
        _tell(report, rank=rank, error=error)
        return getattr(error, "exit_status", 1)
    finally:
        from shoal.runtime import stop_process_group

        stop_process_group(at_once=sys.exc_info()[0] is not None)
    return 0


def _tell(report: int, *, rank: int, error: BaseException) -> None:
    """Report what ended the script, from its own lines on."""
    trace = error.__traceback__
    script = sys.argv[0]
    while trace is not None and trace.tb_frame.f_code.co_filename != script:
        trace = trace.tb_next
    shown = traceback.format_exception(type(error), error, trace or error.__traceback__)
    user = isinstance(error, UserError)
    said = {
        "error": str(error) if user else f"{type(error).__name__}: {error}",
        "rank": rank,
        "user": user,
        "lost": isinstance(error, PeersLost),
        "trace": "".join(shown),
    }
    os.write(report, json.dumps(said).encode() + b"\n")
