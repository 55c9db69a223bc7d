"""Start the real command, wait for a step, find its workers, see that none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tiny import Run, shoal

Process = subprocess.Popen[str]


def wait_until(true: Callable[[], bool], *, what: str, seconds: float = 60) -> None:
    """Poll until `true()`; an AssertionError says `what` never came."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.005)


def family(pid: int) -> dict[int, int]:
    """Every living descendant of `pid`: its pid -> its parent's."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True
    )
    rows = [line.split() for line in listed.stdout.splitlines()]
    parents = {int(row[0]): int(row[1]) for row in rows if not row[2].startswith("Z")}
    found: dict[int, int] = {}
    wanted = {pid}
    while wanted:
        found |= {child: parent for child, parent in parents.items() if parent in wanted}
        wanted = {child for child, parent in found.items() if parent in wanted}
    return found


def server_and_workers(pid: int) -> tuple[int, list[int]]:
    """The fork server of the command `pid`, and its workers in rank order (the order of forks)."""
    descendants = family(pid)
    (server,) = [child for child, parent in descendants.items() if parent == pid]
    return server, sorted(child for child, parent in descendants.items() if parent == server)


def alive(pids: list[int]) -> list[int]:
    """Those of `pids` that still run (zombies do not)."""
    found = []
    for pid in pids:
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
        ).stdout.strip()
        if state and not state.startswith("Z"):
            found.append(pid)
    return found


@contextmanager
def started(*words: str | Path) -> Iterator[Process]:
    """The command in a process group of its own; whatever is left of it goes at the end.

    It hears SIGINT as at a terminal: a suite that runs in the background of a shell ignores it.
    """
    process = subprocess.Popen(
        shoal(*words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.communicate()


def wait_for_step(run: Run, step: int) -> None:
    """Wait until `run` has logged `step`."""
    wait_until(
        lambda: any(row["step"] >= step and "loss" in row for row in run.rows), what=f"step {step}"
    )
