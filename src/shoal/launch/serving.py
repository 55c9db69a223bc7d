"""Replicas of a model that is served: started, heard, ended when stuck, started again.

One thread hears all of them and drives the router; whoever submits may be in any other.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal import __version__
from shoal.config.serve import ServeSection
from shoal.environment import free_memory_bytes, usable_cores
from shoal.errors import ModelError, UserError, WorkerError
from shoal.launch.memory import SPARE
from shoal.launch.pool import Worker, WorkerPool
from shoal.serve.lately import Lately
from shoal.serve.request import Request
from shoal.serve.router import Replica, Router, Told
from shoal.units import format_bytes

_MOST_STARTS = 5
"""Ends of one replica in a row, without a step between, after which it is not started again."""


@dataclass(frozen=True)
class Model:
    """What a replica serves."""

    folder: Path
    adapters: Mapping[str, str]
    version: int = 0


@dataclass(frozen=True)
class Seen:
    """One replica, looked at from outside."""

    ready: bool
    requests: int
    """That it has to answer."""
    silent_seconds: float
    step_seconds: float
    """Mean of late."""
    state: dict[str, Any]
    """What it said last of its queue, its cache and its counters."""


@dataclass
class _Running:
    worker: Worker
    model: Model
    failures: int = 0
    killed: bool = False
    joining: bool = False
    """It is to take the place of another, which goes on if it cannot."""
    failed: ModelError | WorkerError | None = None


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
    lately: Lately = field(default_factory=Lately)
    happened: Callable[[str, dict[str, Any]], None] = lambda name, fields: None
    """Told of replicas that are lost, come back or follow another; see launch/serving_record.py."""

    def __post_init__(self) -> None:
        count = self.settings.replicate
        self.num_replicas = 1 if count == "auto" else count
        threads = self.settings.threads
        self.threads = max(1, usable_cores() // self.num_replicas) if threads == "auto" else threads
        self._lock = threading.RLock()
        self._workers: dict[int, _Running] = {}
        self.model = Model(self.folder, dict(self.settings.adapters))
        self._failed: ModelError | WorkerError | None = None
        self._closing = False
        self._swapping = threading.Lock()
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
                self._start(index, self.model)
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

    def counts(self) -> dict[str, int]:
        """What engines count, over all replicas that there are and were."""
        with self._lock:
            return dict(self.router.counts())

    def seen(self) -> dict[int, Seen]:
        """What each replica is doing, as far as is known."""
        now = time.monotonic()
        with self._lock:
            return {
                index: Seen(
                    ready=each.ready,
                    requests=self.router.load(index),
                    silent_seconds=now - each.heard_at,
                    step_seconds=each.step_seconds,
                    state=dict(each.state),
                )
                for index, each in self.router.replicas.items()
            }

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

    def swap(self, folder: Path, adapters: Mapping[str, str]) -> None:
        """Serve another model: each replica in turn gets a follower, and ends when it has no work.

        Requests that were begun are finished by the model that began them. Where a follower cannot
        start, all is as before. Raises what it says, and UserError while another swap goes on, or
        where the follower would find no memory.
        """
        if not self._swapping.acquire(blocking=False):
            raise UserError("another swap is under way; wait until it is done")
        try:
            check_memory(folder, self.settings, replicas=1)
            before = self.model
            after = Model(folder, dict(adapters), before.version + 1)
            done: list[int] = []
            try:
                for index in list(self.router.replicas):
                    done.append(self._follow(index, after))
            except (ModelError, WorkerError):
                for index in done:
                    self._follow(index, before)
                raise
            self.model = after
            self.happened("swapped", {"text": f"{folder} is served now"})
        finally:
            self._swapping.release()

    def _follow(self, index: int, model: Model) -> int:
        """Put a replica of `model` in the place of replica `index`; its own number."""
        with self._lock:
            follower = max(self.router.replicas) + 1
            self.router.replicas[follower] = Replica(version=model.version)
            self._start(follower, model, joining=True)
            running = self._workers[follower]
        while not self.router.replicas[follower].ready:
            if running.failed is not None or self._failed is not None or self._closing:
                self._remove(follower)
                raise running.failed or self._failed or WorkerError("the server is ending")
            time.sleep(0.02)
        with self._lock:
            running.joining = False
            self.router.replicas[index].leaving = True
        while self.router.load(index) and not self._closing:
            time.sleep(0.02)
        self._remove(index)
        return follower

    def _remove(self, index: int) -> None:
        with self._lock:
            gone = self._workers.pop(index)
            self.router.remove(index)
            if gone.worker.status is None:
                self.pool.kill([gone.worker])

    def _start(self, index: int, model: Model, *, joining: bool = False) -> None:
        chosen = self.settings
        payload = {
            "folder": str(model.folder),
            "index": index,
            "device": chosen.device,
            "threads": self.threads,
            "tensor": chosen.tensor,
            "pieces": chosen.sum_pieces,
            "cache_bytes": None if chosen.cache_bytes == "auto" else chosen.cache_bytes,
            "precision": chosen.precision,
            "exact": chosen.exact == "auto",
            "int8": chosen.weights == "int8",
            "block_tokens": chosen.block_tokens,
            "step_tokens": chosen.step_tokens,
            "max_running": chosen.max_running,
            "share_prefixes": chosen.share_prefixes,
            "guesses": chosen.guesses,
            "adapters": dict(model.adapters),
        }
        failures = self._workers[index].failures if index in self._workers else 0
        worker = self.pool.start("shoal.serve.replica:run", payload)
        self._workers[index] = _Running(worker, model, failures, joining=joining)

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
        running = self._workers.get(index)
        if running is None or running.worker is not worker:
            return
        if message is None:
            self._ended(index, running)
            return
        if "failed" in message:
            user = message["status"] == UserError.exit_status
            error = (ModelError if user else WorkerError)(message["failed"])
            if running.joining:
                running.failed = error
            else:
                self._failed = error
            return
        if "ready" in message:
            self.facts = message["ready"]
            if running.failures:
                text = f"replica {index} is ready again"
                self.happened("recovered", {"rank": index, "text": text})
        elif message.get("events"):
            running.failures = 0
        self.router.hear(index, message)

    def _ended(self, index: int, running: _Running) -> None:
        if self._closing or self._failed is not None or running.failed is not None:
            return
        if running.joining:
            running.failed = WorkerError(
                f"the replica that was to follow ended (status {running.worker.status}); its "
                "output above says why"
            )
            return
        running.failures += 1
        if running.failures > _MOST_STARTS:
            self._failed = WorkerError(
                f"replica {index} ended {running.failures} times in a row (status "
                f"{running.worker.status}); its output above says why"
            )
            return
        self.restarts += 1
        status, replays = running.worker.status, self.router.replays
        self.say(f"replica {index} ended (status {status}): started again")
        self.router.lost(index)
        again = self.router.replays - replays
        text = f"replica {index} ended (status {status}): {again} requests go on elsewhere"
        self.happened("lost", {"rank": index, "text": text})
        self._start(index, running.model)

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
                    text = f"replica {index} has work and says nothing: ended"
                    self.say(text)
                    self.happened("stuck", {"rank": index, "text": text})
                    self.pool.signal(running.worker, signal.SIGKILL)


def check_memory(folder: Path, settings: ServeSection, *, replicas: int) -> None:
    """Refuse a model that this machine has no room for, before it is loaded. Raises UserError."""
    from shoal.serve.sizing import bytes_of

    free = free_memory_bytes()
    if free is None:
        return
    cache = None if settings.cache_bytes == "auto" else settings.cache_bytes
    short = settings.weights == "int8"
    each = bytes_of(folder, precision=settings.precision, int8=short, cache_bytes=cache)
    if replicas * each > SPARE * free:
        raise UserError(
            f"{folder}: {replicas} replica{'s'[: replicas > 1]} of it would take "
            f"{format_bytes(replicas * each)}, and {format_bytes(free)} are free here\n"
            "    set replicate or cache_bytes lower, or weights: int8"
        )


@contextmanager
def needs_extra() -> Iterator[None]:
    """Around imports of what the extra `serve` installs: UserError where it is not."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"shoal serve needs {error.name}, which is not installed\n"
            "    pip install 'shoal[serve]'"
        ) from None


def open_service(
    model: Path, *, settings: ServeSection
) -> tuple[Path, list[bytes], Callable[[Fleet], Any]]:
    """(folder, keys, what makes the application of a fleet), all of the user's mistakes found.

    Raises UserError, ModelError, and UserError where the extra `serve` is not installed.
    """
    from shoal.serve.reading import model_directory

    folder = model_directory(model)
    with needs_extra():
        from shoal.serve.http.app import make_app
        from shoal.serve.http.guard import read_keys
        from shoal.serve.http.service import Service
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{folder}: it has no tokenizer, so it reads no text\n"
            "    give the folder of a language model"
        )
    keys = read_keys(settings.keys)
    if settings.device == "cuda":
        from shoal.runtime import choose_device

        choose_device("cuda", local_rank=0, key="serve.device")
    replicas = 1 if settings.replicate == "auto" else settings.replicate
    check_memory(folder, settings, replicas=replicas)

    def make(fleet: Fleet) -> Any:
        service = Service(folder, settings=settings, replicas=fleet)
        return make_app(service, keys=keys, version=__version__)

    return folder, keys, make


def listen(settings: ServeSection) -> socket.socket:
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
