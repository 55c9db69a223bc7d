"""What the supervisor asks of a worker: a generation, a save, a stop; heard by its own thread."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Disk:
    """A disk that only the ranks of one host save on."""

    ranks: tuple[int, ...]
    """Of the generation, this host's, in order."""
    count: int
    """Of the generation's hosts, each of which has one."""
    host: int | None = None
    """Its number among them, where each saves what its ranks hold; None: each has whole replicas,
    and saves all of it."""


@dataclass(frozen=True)
class Generation:
    """Who belongs together from now on: this worker's rank among `size`, and where they meet."""

    number: int
    rank: int
    size: int
    meeting: str
    """A URL, such as file:///tmp/x/generation-000001."""
    here: int | None = None
    """How many of its ranks are on this worker's host; None: all."""
    registered: bool = False
    """Whether a registry knows it, and says which of its saves count."""
    disk: Disk | None = None
    """Which of its ranks save on this worker's disk, where hosts share none."""


@dataclass
class Orders:
    """The newest orders. Without a supervisor nothing ever arrives."""

    stop: threading.Event = field(default_factory=threading.Event)
    save: threading.Event = field(default_factory=threading.Event)
    broken_generation: int = -1
    """The newest generation that lost a rank: no sum of it completes any more."""
    on_lost: Callable[[int], None] = lambda number: None
    """Called, in a thread, when a generation has lost a rank."""
    _generation: Generation | None = None
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def listen(self, descriptor: int, *, on_end: Callable[[], None] = lambda: None) -> Orders:
        """Start hearing orders on `descriptor` (launch/pool.py, `send`).

        `on_end`: called, in a thread, when who gives them is gone.
        """
        arguments = (descriptor, on_end)
        threading.Thread(target=self._receive, args=arguments, name="orders", daemon=True).start()
        return self

    def newer_than(self, number: int) -> Generation | None:
        """The newest generation announced, when it is newer than `number`."""
        generation = self._generation
        return generation if generation is not None and generation.number > number else None

    def wait_for_newer(self, number: int, *, timeout_seconds: float) -> Generation | None:
        """As `newer_than`, waiting for one; None after `timeout_seconds`."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.newer_than(number) is not None, timeout=timeout_seconds
            )
        return self.newer_than(number)

    def _receive(self, descriptor: int, on_end: Callable[[], None]) -> None:
        text = b""
        while True:
            try:
                data = os.read(descriptor, 1 << 16)
            except ConnectionResetError:
                data = b""
            except OSError:
                return
            if not data:
                on_end()
                return
            *lines, text = (text + data).split(b"\n")
            for line in lines:
                self._follow(json.loads(line))

    def _follow(self, order: dict[str, object]) -> None:
        if order["order"] == "save":
            self.save.set()
        elif order["order"] == "stop":
            self.stop.set()
        elif order["order"] == "lost":
            self.broken_generation = int(str(order["number"]))
            self.on_lost(self.broken_generation)
        elif order["order"] == "generation":
            with self._changed:
                self._generation = Generation(
                    int(str(order["number"])),
                    int(str(order["rank"])),
                    int(str(order["size"])),
                    str(order["meeting"]),
                    None if order.get("here") is None else int(str(order["here"])),
                    bool(order.get("registered")),
                    _disk(order.get("disk")),
                )
                self._changed.notify_all()


def _disk(said: Any) -> Disk | None:
    if said is None:
        return None
    host = None if said["host"] is None else int(said["host"])
    return Disk(tuple(map(int, said["ranks"])), int(said["count"]), host)
