"""An agent of a host in a thread of this process, which can be held: then its host is silent."""

from __future__ import annotations

import threading
import time
from typing import Any

from shoal.comm.keys import Keys
from shoal.launch.agent import Agent
from shoal.launch.pool import WorkerPool

SECRET = b"s" * 32


class HeldAgent:
    """`agent` turns until `close`, but for the time in which `held` is set."""

    def __init__(self, pool: WorkerPool, **more: Any) -> None:
        self.said: list[str] = []
        self.agent = Agent(pool, keys=Keys.of(SECRET), say=self.said.append, **more)
        self.held, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            if self.held.is_set():
                time.sleep(0.01)
            else:
                self.agent.turn()
        self.agent.close()

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
