"""Planned faults: real ones, committed by a worker on itself at a rank, step and phase.

For rehearsals and tests only. A fault says so to the supervisor before it happens, which takes it
off the plan, so that a worker that takes this one's place does not do it again.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.checkpoint.files import Files
from shoal.engine.training import Training
from shoal.observe.events import Report

PHASES = ("batches", "verify", "forward", "backward", "reduce", "apply", "commit", "save")
"""Where a fault may strike, as the pulse names it; `reducing` is inside the reduction."""
KINDS = {
    "kill": "forward",
    "stop": "forward",
    "spin": "forward",
    "exit": "forward",
    "raise": "forward",
    "slow": "forward",
    "nan": "batches",
    "spike": "batches",
    "flip-parameter": "batches",
    "flip-optimizer": "batches",
    "disk-full": "save",
    "out-of-memory": "forward",
    "sigterm": "forward",
}
"""Kinds, and the phase each strikes in unless another is given."""
_ALLOCATION_BYTES = 64 * 2**20


def attach(
    faults: Iterable[dict[str, Any]], training: Training, report: Report, *, rank: int
) -> None:
    """Let worker `rank` commit its faults when they are due."""
    planned = PlannedFaults(faults, rank, training, report)
    training.ranks.world.pulse.on_mark = planned.mark


class PlannedFaults:
    """Those of one rank; `mark` hangs on its pulse."""

    def __init__(
        self, faults: Iterable[dict[str, Any]], rank: int, training: Training, report: Report
    ) -> None:
        self._left = [fault for fault in faults if fault["rank"] == rank]
        self._training, self._report = training, report
        self._slow_seconds = 0.0

    def mark(self, phase: str, step: int) -> None:
        """Commit what is due when `step` enters `phase`."""
        if self._slow_seconds and phase == "forward":
            time.sleep(self._slow_seconds)
        for fault in list(self._left):
            wanted = fault.get("phase") or KINDS[fault["kind"]]
            inside = wanted == "reducing" and phase == "reduce"
            if step == fault["step"] and (phase == wanted or inside):
                self._left.remove(fault)
                self._report.say("fault", number=fault["number"], at=time.monotonic(), step=step)
                self._commit(fault["kind"], fault.get("argument"), inside=inside)

    def _commit(self, kind: str, argument: str | None, *, inside: bool) -> None:
        training = self._training
        if kind in ("kill", "stop"):
            number = signal.SIGKILL if kind == "kill" else signal.SIGSTOP
            if inside:  # a moment from now, when the collective is under way
                threading.Timer(0.002, os.kill, (os.getpid(), number)).start()
            else:
                os.kill(os.getpid(), number)
        elif kind == "spin":
            while True:
                pass
        elif kind == "exit":
            os._exit(0)
        elif kind == "raise":
            raise RuntimeError("a planned error")
        elif kind == "slow":
            self._slow_seconds = float(argument or 0.2)
        elif kind in ("nan", "spike"):
            training.step.poison = float("nan") if kind == "nan" else 1e6
        elif kind == "flip-parameter":
            flip_bit(training.state.values, argument)
        elif kind == "flip-optimizer":
            flip_bit(list(training.state.vectors.values())[-1].tensor, argument)
        elif kind == "disk-full":
            training.store.files = FullOnce(training.store.files)
        elif kind == "out-of-memory":
            exhaust_memory()
        elif kind == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)


def flip_bit(vector: Tensor, where: str | None) -> None:
    """Flip one bit of a float32 vector; `where`: ELEMENT or ELEMENT/BIT (default: 1/12)."""
    element, _, bit = (where or "1/12").partition("/")
    word = vector.view(torch.int32)
    word[int(element)] ^= 1 << int(bit or 12)


def exhaust_memory() -> None:
    """Allocate until the system refuses, under a limit a little above what is used now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * _ALLOCATION_BYTES, resource.RLIM_INFINITY))
    kept = []
    while True:
        kept.append(torch.ones(_ALLOCATION_BYTES // 4))


class FullOnce(Files):
    """The disk is full for one save, then there is room again."""

    def __init__(self, inner: Files) -> None:
        self._inner, self._full = inner, True

    def _about_to(self, operation: str) -> None:
        if self._full and operation == "write":
            self._full = False
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
