"""The picture of a run's task (a confusion matrix, boxes, ranked films), drawn while it trains.

Workers leave what it is drawn of at each evaluation (shown.json); who watches them draws. A drawing
takes a tenth of a second and more of a core that may be training, so the next one is as long in
coming as keeps all of them together below SHARE of one core. The end of a run draws in any case.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from pathlib import Path

from shoal.observe.events import SHOWN
from shoal.tasks.kinds import create

SHARE = 0.01
FIRST_SECONDS = 1.0
"""What the first drawing takes, matplotlib's import with it, before it is known."""


def draw_picture(run: Path, kind: str) -> None:
    """Draw what the last evaluation has left, if the task has a picture; it is there whole or not.

    Raises whatever a font, a disk or matplotlib may.
    """
    task, shown = create(kind), run / SHOWN
    if task.picture is None or not shown.is_file():
        return
    beside = run / f".{task.picture}"
    try:
        task.draw(json.loads(shown.read_text(encoding="utf-8")), beside)
        os.replace(beside, run / task.picture)
    finally:
        beside.unlink(missing_ok=True)


class Pictures:
    """Draws in a thread of its own; its owner calls `evaluated`, and `close` before it draws."""

    def __init__(self, run: Path, kind: str) -> None:
        self._run, self._kind = run, kind
        self._due = time.monotonic() + FIRST_SECONDS / SHARE
        self._thread: threading.Thread | None = None

    def evaluated(self) -> None:
        """An evaluation was written: draw it, unless one was drawn lately."""
        if time.monotonic() < self._due:
            return
        self._due = math.inf  # until it is known what this one takes
        self._thread = threading.Thread(target=self._draw, name="picture", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait for a drawing that goes on."""
        if self._thread is not None:
            self._thread.join()

    def _draw(self) -> None:
        began = time.thread_time()
        try:
            draw_picture(self._run, self._kind)
        except Exception:  # no more of them: the end of the run tries once more, and says why
            return
        self._due = time.monotonic() + (time.thread_time() - began) / SHARE
