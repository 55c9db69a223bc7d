"""The fork server: a small process that has imported torch and forks workers in milliseconds.

It is exec'ed with the workers' environment (OMP_NUM_THREADS, no spinning), imports what every
worker needs, and never runs a tensor operation nor starts a thread: a parent that has used OpenMP
hangs its forked children. It speaks lines of JSON over one Unix socket; each request to start a
worker carries the file descriptor on which that worker reports. No pickle, no listening socket.

requests: {"start": id, "target": "module:function", "payload": {...}} with one descriptor
          {"kill": pid, "signal": n}
answers:  {"ready": seconds}   {"started": id, "pid": pid}   {"exited": pid, "status": n}
When the other end closes, every worker is killed and the server ends.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from typing import Any

PRELOAD = (
    "torch",
    "torch.distributed",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "shoal.engine.worker",
)


_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _status(code: int) -> int:
    """Exit status, or minus the signal number."""
    return -os.WTERMSIG(code) if os.WIFSIGNALED(code) else os.WEXITSTATUS(code)


def run_worker(target: str, payload: dict[str, Any], report: int) -> int:
    """Call `module:function(payload, report)`; returns its exit status."""
    module, _, function = target.partition(":")
    status: int = getattr(importlib.import_module(module), function)(payload, report)
    return status


def _die_with(parent: int) -> None:
    """Ask Linux to end this process when its parent ends: nobody else would, were it killed."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the request
        os._exit(1)


def _child(request: dict[str, Any], report: int, *, server: int) -> None:
    """In the forked worker: restore signals, run, and leave without the server's clean-up.

    SIGTERM stays blocked, as in the server, until the worker has its own answer to it.
    """
    status = 1
    try:
        _die_with(server)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
        gc.enable()
        status = run_worker(request["target"], request["payload"], report)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class Server:
    """The loop of the server process.

    `start`: `fork`; or `exec` where a forked child may not use what its parent has loaded (macOS:
    Accelerate and Objective-C), which costs each worker its own imports.
    """

    def __init__(self, link: socket.socket, *, start: str) -> None:
        self._link, self._start = link, start
        self._text = b""
        self._descriptors: list[int] = []
        self._children: set[int] = set()

    def _say(self, **message: Any) -> None:
        try:
            self._link.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self._end()

    def _end(self) -> None:
        for pid in self._children:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        os._exit(0)

    def _reap(self) -> None:
        while self._children:
            pid, code = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._children.discard(pid)
            self._say(exited=pid, status=_status(code))

    def _follow(self, request: dict[str, Any]) -> None:
        if "kill" in request:
            if request["kill"] in self._children:
                os.kill(request["kill"], request["signal"])
            return
        report = self._descriptors.pop(0)
        pid = self._exec(request, report) if self._start == "exec" else self._fork(request, report)
        os.close(report)
        self._children.add(pid)
        self._say(started=request["start"], pid=pid)

    def _exec(self, request: dict[str, Any], report: int) -> int:
        word = f"{report},{os.getpid()}"
        worker = subprocess.Popen(
            [sys.executable, "-m", "shoal.launch.forkserver", "worker", word],
            stdin=subprocess.PIPE,
            pass_fds=[report],
        )
        assert worker.stdin is not None, "asked for a pipe"
        worker.stdin.write(json.dumps(request).encode())
        worker.stdin.close()
        worker.returncode = 0  # _reap waits for it; the object must not
        return worker.pid

    def _fork(self, request: dict[str, Any], report: int) -> int:
        server = os.getpid()
        with warnings.catch_warnings():
            # Python 3.12 warns of threads that libraries' imports have started; none computes
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            self._link.close()
            for other in self._descriptors:  # else another worker's report never reads as ended
                os.close(other)
            _child(request, report, server=server)
        return pid

    def run(self) -> None:
        """Serve until the other end closes."""
        began = time.perf_counter()
        gc.disable()  # imports make objects that stay: looking for garbage among them costs 5 %
        for module in PRELOAD if self._start == "fork" else ():
            importlib.import_module(module)
        gc.freeze()  # nor does a child's collector then write to pages that are shared
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_read, False)
        os.set_blocking(wake_write, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self._say(ready=time.perf_counter() - began)
        while True:
            link = self._link.fileno()
            readable, _, _ = select.select([link, wake_read], [], [])
            if wake_read in readable:
                os.read(wake_read, 4096)
                self._reap()
            if link in readable:
                data, descriptors, _, _ = socket.recv_fds(self._link, 1 << 16, 16)
                if not data:
                    self._end()
                self._descriptors += descriptors
                *lines, self._text = (self._text + data).split(b"\n")
                for line in lines:
                    self._follow(json.loads(line))


def main() -> None:
    """Entry point: `fork|exec DESCRIPTOR` serves; `worker REPORT,SERVER` is one exec'ed worker."""
    role, word = sys.argv[1:]
    # A signal for the whole process group is the parent's to answer; the server ends with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if role == "worker":
        report, server = map(int, word.split(","))
        _child(json.loads(sys.stdin.buffer.read()), report, server=server)
    Server(socket.socket(fileno=int(word)), start=role).run()


if __name__ == "__main__":
    main()
