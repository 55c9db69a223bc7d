"""The parent's end of the fork server: start workers, hear their reports, notice their deaths."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from shoal.environment import worker_environment
from shoal.errors import WorkerError


@dataclass
class Worker:
    """One worker process: what it said last, and how it ended (None: it runs).

    `report` is our end of a socket pair: reports come in, orders go out.
    """

    name: int
    report: int
    pid: int | None = None
    status: int | None = None
    open: bool = True
    text: bytes = b""
    pending: list[int] = field(default_factory=list)
    """Signals sent before the server said which process it is."""
    told: bool = False
    """Whether somebody has heard of its end."""


@dataclass
class WorkerPool:
    """Starts the fork server at once, so that its imports overlap with the caller's own work.

    `start_method`: `fork`, or `exec` where a child may not use what was loaded before the fork.

    Use as a context manager: leaving it ends every worker.
    """

    threads: int = 1
    start_method: str = "exec" if sys.platform == "darwin" else "fork"
    workers: dict[int, Worker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ours, theirs = socket.socketpair()
        module = "shoal.launch.forkserver"
        self._server = subprocess.Popen(
            [sys.executable, "-m", module, self.start_method, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=worker_environment(threads=self.threads),
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._link = ours
        self._text = b""
        self._reading = threading.RLock()
        self._next = 0
        self.ready_seconds: float | None = None

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server and every worker."""
        self._link.close()
        if not self.workers:
            self._server.kill()  # it may still import, and nobody depends on it
        try:
            self._server.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        for worker in self.workers.values():
            if worker.open:
                os.close(worker.report)
                worker.open = False

    def start(self, target: str, payload: dict[str, Any]) -> Worker:
        """Ask for a worker that runs `module:function(payload, report_descriptor)`."""
        ours, theirs = socket.socketpair()
        with self._reading:  # known before another thread can read that it has started
            worker = Worker(self._next, ours.detach())
            self.workers[self._next] = worker
            self._next += 1
        request = {"start": worker.name, "target": target, "payload": payload}
        line = json.dumps(request).encode() + b"\n"
        try:
            sent = socket.send_fds(self._link, [line], [theirs.fileno()])
            self._link.sendall(line[sent:])
        except OSError:
            os.close(worker.report)
            del self.workers[worker.name]
            raise WorkerError(self._server_died()) from None
        finally:
            theirs.close()
        return worker

    def send(self, worker: Worker, message: dict[str, Any]) -> None:
        """Give a worker an order (engine/membership/orders.py); one that is gone needs none."""
        data = json.dumps(message).encode() + b"\n"
        with suppress(OSError):
            while data and worker.open:
                data = data[os.write(worker.report, data) :]

    def signal(self, worker: Worker, number: int) -> None:
        """Send a signal to a worker that still runs."""
        if worker.pid is None:
            worker.pending.append(int(number))
        elif worker.status is None:
            request = {"kill": worker.pid, "signal": int(number)}
            try:
                self._link.sendall(json.dumps(request).encode() + b"\n")
            except OSError:
                raise WorkerError(self._server_died()) from None

    def kill(self, workers: list[Worker]) -> None:
        """End `workers` at once and wait until they are gone."""
        for worker in workers:
            self.signal(worker, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while any(w.status is None for w in workers) and time.monotonic() < deadline:
            for _ in self.events(timeout_seconds=0.5, only=workers):
                pass
            if any(w.pid is None and w.status is None for w in workers):
                deadline = time.monotonic() + 10  # the fork server still imports, or it would raise

    def descriptors(self, only: Iterable[Worker]) -> list[int]:
        """What to wait on, for who waits for something else too, until `events` has anything."""
        return [self._link.fileno(), *(worker.report for worker in only if worker.open)]

    def _server_died(self) -> str:
        try:
            status = self._server.wait(timeout=2)
        except subprocess.TimeoutExpired:
            status = None
        return f"the fork server ended (status {status}); its output above says why"

    def events(
        self, *, timeout_seconds: float, only: list[Worker] | None = None
    ) -> Iterator[tuple[Worker, dict[str, Any] | None]]:
        """What happens within `timeout_seconds`: (worker, message), or (worker, None) at its end.

        A worker's end comes after everything it said. Returns after the first batch. Of several
        threads each hears of the workers in its `only`, whoever reads what the server says.
        """
        chosen = list(self.workers.values()) if only is None else only
        if any(w.status is not None and not w.told for w in chosen):
            timeout_seconds = 0.0
        reports = {w.report: w for w in chosen if w.open}
        link = self._link.fileno()
        readable, _, _ = select.select([link, *reports], [], [], timeout_seconds)
        for descriptor in readable:
            if descriptor in reports and reports[descriptor].open:
                yield from self._hear(reports[descriptor])
        if link in readable:
            self._answers()
        # all of them are known before anybody hears of one, and ends others (`kill`)
        for worker in [w for w in chosen if w.status is not None]:
            with self._reading:
                told, worker.told = worker.told, True
            while worker.open and not told:
                yield from self._hear(worker, wait_seconds=0.1)
            if not told:
                yield worker, None

    def _hear(
        self, worker: Worker, *, wait_seconds: float = 0.0
    ) -> Iterator[tuple[Worker, dict[str, Any]]]:
        with self._reading:  # another thread may have read it since it was seen to be readable
            if not worker.open or not select.select([worker.report], [], [], wait_seconds)[0]:
                return
            try:
                data = os.read(worker.report, 1 << 16)
            except ConnectionResetError:  # it died with orders unread
                data = b""
            if not data:
                os.close(worker.report)
                worker.open = False
                return
            *lines, worker.text = (worker.text + data).split(b"\n")
        for line in lines:
            yield worker, json.loads(line)

    def _answers(self) -> None:
        """Read what the server says of processes that have started or ended. Raises WorkerError."""
        with self._reading:
            if not select.select([self._link], [], [], 0)[0]:
                return  # another thread has read it
            data = self._link.recv(1 << 16)
            if not data:
                raise WorkerError(self._server_died())
            *lines, self._text = (self._text + data).split(b"\n")
            for answer in map(json.loads, lines):
                if "ready" in answer:
                    self.ready_seconds = answer["ready"]
                elif "started" in answer:
                    worker = self.workers[answer["started"]]
                    worker.pid = answer["pid"]
                    for number in worker.pending:
                        self.signal(worker, number)
                elif "exited" in answer:
                    for worker in self.workers.values():
                        if worker.pid == answer["exited"] and worker.status is None:
                            worker.status = answer["status"]


def pool_or_own(given: WorkerPool | None) -> AbstractContextManager[WorkerPool]:
    """`given`, which stays open, or a new pool for the time of a `with`."""
    return nullcontext(given) if given is not None else WorkerPool()
