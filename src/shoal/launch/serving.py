"""Replicas of a model that is served: started, heard, ended when stuck, started again.

One thread hears all of them and drives the router; whoever submits may be in any other.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal import __version__
from shoal.config.serve import ServeSection
from shoal.environment import usable_cores
from shoal.errors import ModelError, UserError, WorkerError
from shoal.launch.pool import Worker, WorkerPool
from shoal.serve.request import Request
from shoal.serve.router import Replica, Router, Told

_MOST_STARTS = 5
"""Ends of one replica in a row, without a step between, after which it is not started again."""


@dataclass
class _Running:
    worker: Worker
    failures: int = 0
    killed: bool = False


@dataclass
class Fleet:
    """The replicas of one model. A context manager: leaving it ends them."""

    folder: Path
    settings: ServeSection
    pool: WorkerPool
    say: Callable[[str], None] = lambda text: None
    facts: dict[str, Any] = field(default_factory=dict)
    """What the first replica said of itself when it was ready."""
    restarts: int = 0

    def __post_init__(self) -> None:
        count = self.settings.replicate
        self.num_replicas = 1 if count == "auto" else count
        threads = self.settings.threads
        self.threads = max(1, usable_cores() // self.num_replicas) if threads == "auto" else threads
        self._lock = threading.RLock()
        self._workers: dict[int, _Running] = {}
        self._failed: ModelError | WorkerError | None = None
        self._closing = False
        self.router = Router(
            send=self._send,
            queue_requests=self.settings.queue_requests,
            queue_tokens=self.settings.queue_tokens,
            max_running=self.settings.max_running,
        )
        self._thread = threading.Thread(target=self._hear, name="replicas", daemon=True)

    def __enter__(self) -> Fleet:
        with self._lock:
            for index in range(self.num_replicas):
                self.router.replicas[index] = Replica()
                self._start(index)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_ready(self, *, timeout_seconds: float = 600.0) -> None:
        """Until every replica can serve. Raises what a replica that cannot says."""
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            with self._lock:
                if self._failed is not None:
                    raise self._failed
                if all(each.ready for each in self.router.replicas.values()):
                    return
            time.sleep(0.02)
        raise WorkerError(f"{self.folder}: no replica was ready within {timeout_seconds:g} s")

    def submit(self, request: Request, told: Told) -> None:
        """Serve a request; `told` is called in another thread. Raises Busy, WorkerError."""
        with self._lock:
            if self._failed is not None:
                raise self._failed
            self.router.submit(request, told)

    def cancel(self, name: str) -> None:
        """Forget a request."""
        with self._lock:
            self.router.cancel(name)

    @property
    def replays(self) -> int:
        """Requests that another replica went on with."""
        return self.router.replays

    def healthy(self) -> bool:
        """Whether a replica is ready and none that has work was silent for long."""
        with self._lock:
            ready = any(each.ready for each in self.router.replicas.values())
            silence = self.settings.silence_seconds / 3
            return ready and self._failed is None and not self.router.stuck(silence_seconds=silence)

    def takes_requests(self) -> bool:
        """Whether a new request would be computed now: healthy, its queue not full, not ending."""
        with self._lock:
            return self.healthy() and not self._closing and self.router.has_room()

    def states(self) -> dict[int, dict[str, Any]]:
        """What each replica said last of its queue and its counters."""
        with self._lock:
            return {index: dict(each.state) for index, each in self.router.replicas.items()}

    def workers(self) -> dict[int, int | None]:
        """Process of each replica."""
        with self._lock:
            return {index: each.worker.pid for index, each in self._workers.items()}

    def close(self) -> None:
        """End every replica."""
        self._closing = True
        self._thread.join(timeout=10)
        with self._lock:
            self.pool.kill([e.worker for e in self._workers.values() if e.worker.status is None])

    def _start(self, index: int) -> None:
        chosen = self.settings
        payload = {
            "folder": str(self.folder),
            "threads": self.threads,
            "cache_bytes": None if chosen.cache_bytes == "auto" else chosen.cache_bytes,
            "precision": chosen.precision,
            "exact": chosen.exact == "auto",
            "int8": chosen.weights == "int8",
            "block_tokens": chosen.block_tokens,
            "step_tokens": chosen.step_tokens,
            "max_running": chosen.max_running,
            "share_prefixes": chosen.share_prefixes,
            "guesses": chosen.guesses,
            "adapters": dict(chosen.adapters),
        }
        failures = self._workers[index].failures if index in self._workers else 0
        worker = self.pool.start("shoal.serve.replica:run", payload)
        self._workers[index] = _Running(worker, failures)

    def _send(self, index: int, order: dict[str, Any]) -> None:
        self.pool.send(self._workers[index].worker, order)

    def _hear(self) -> None:
        while not self._closing:
            with self._lock:
                ours = {id(each.worker): index for index, each in self._workers.items()}
                workers = [each.worker for each in self._workers.values()]
            try:
                for worker, message in self.pool.events(timeout_seconds=0.2, only=workers):
                    with self._lock:
                        if id(worker) in ours:
                            self._heard(ours[id(worker)], worker, message)
                self._see_ended()
                self._end_stuck()
            except WorkerError as error:
                self._failed = error
                return

    def _heard(self, index: int, worker: Worker, message: dict[str, Any] | None) -> None:
        running = self._workers[index]
        if running.worker is not worker:
            return
        if message is None:
            self._ended(index, running)
            return
        if "failed" in message:
            user = message["status"] == UserError.exit_status
            self._failed = (ModelError if user else WorkerError)(message["failed"])
            return
        if "ready" in message:
            self.facts = message["ready"]
        elif message.get("events"):
            running.failures = 0
        self.router.hear(index, message)

    def _ended(self, index: int, running: _Running) -> None:
        if self._closing or self._failed is not None:
            return
        running.failures += 1
        if running.failures > _MOST_STARTS:
            self._failed = WorkerError(
                f"replica {index} ended {running.failures} times in a row (status "
                f"{running.worker.status}); its output above says why"
            )
            return
        self.restarts += 1
        self.say(f"replica {index} ended (status {running.worker.status}): started again")
        self.router.lost(index)
        self._start(index)

    def _see_ended(self) -> None:
        """Ends that somebody else with the same pool has heard of."""
        with self._lock:
            for index, running in list(self._workers.items()):
                if running.worker.status is not None:
                    self._heard(index, running.worker, None)

    def _end_stuck(self) -> None:
        with self._lock:
            for index in self.router.stuck(silence_seconds=self.settings.silence_seconds):
                running = self._workers[index]
                if not running.killed:
                    running.killed = True
                    self.say(f"replica {index} has work and says nothing: ended")
                    self.pool.signal(running.worker, signal.SIGKILL)


def open_service(
    model: Path, *, settings: ServeSection
) -> tuple[Path, list[bytes], Callable[[Fleet], Any]]:
    """(folder, keys, what makes the application of a fleet), all of the user's mistakes found.

    Raises UserError, ModelError, and UserError where the extra `serve` is not installed.
    """
    from shoal.serve.reading import model_directory

    folder = model_directory(model)
    try:
        from shoal.serve.http.app import make_app
        from shoal.serve.http.guard import read_keys
        from shoal.serve.http.service import Service
    except ModuleNotFoundError as error:
        raise UserError(
            f"shoal serve needs {error.name}, which is not installed\n"
            "    pip install 'shoal[serve]'"
        ) from None
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{folder}: it has no tokenizer, so it reads no text\n"
            "    give the folder of a language model"
        )
    keys = read_keys(settings.keys)

    def make(fleet: Fleet) -> Any:
        service = Service(folder, settings=settings, replicas=fleet)
        return make_app(service, keys=keys, version=__version__)

    return folder, keys, make


def serve_forever(
    model: Path,
    *,
    settings: ServeSection,
    phase: Callable[[str], None],
    say: Callable[[str], None],
    began: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal; then answer what is being answered, and end. `began`: it is served.

    Raises what `open_service` raises, UserError for an address that cannot be had, and what a
    replica that cannot start says.
    """
    folder, _, make = open_service(model, settings=settings)
    import uvicorn

    count = 1 if settings.replicate == "auto" else settings.replicate
    threads = max(1, usable_cores() // count) if settings.threads == "auto" else settings.threads
    with (
        _listen(settings) as listening,
        WorkerPool(threads) as pool,
        Fleet(folder, settings, pool, say=say) as fleet,
    ):
        phase(f"reading {folder}")
        fleet.wait_ready()
        phase(str(fleet.facts["products"]))
        began()
        host, port = listening.getsockname()[:2]
        say(f"serving {folder} at http://{host}:{port}/v1 with {fleet.num_replicas} replica(s)")
        chosen = uvicorn.Config(make(fleet), log_level="warning", access_log=False)
        # uvicorn answers a signal by ending in order, and then raises it again: not to us
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        uvicorn.Server(chosen).run(sockets=[listening])


def _listen(settings: ServeSection) -> socket.socket:
    """The socket, before anything is loaded. Raises UserError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((settings.host, settings.port))
        made.listen(128)  # who comes before the model is ready waits
    except OSError as error:
        made.close()
        raise UserError(
            f"serve.port: {settings.host}:{settings.port} cannot be had: {error.strerror}\n"
            "    choose another, or 0 for any free one"
        ) from None
    return made
