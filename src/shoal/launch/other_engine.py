"""Another engine's server as children of ours: found, started, waited for, started again.

They run in their own environment: from their program's path, without what would let them import
our packages. They listen on loopback only, so that whoever comes passes our door.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shoal.config.serve import ServeSection
from shoal.environment import environment_of_others, usable_cores
from shoal.errors import RunError, UserError

_PROGRAMS = {"vllm": "vllm", "llamacpp": "llama-server"}
_HOW = {
    "vllm": "install it in an environment of its own (pip install vllm)",
    "llamacpp": "install llama.cpp (brew install llama.cpp, or a release of it)",
}
_POLL_SECONDS = 0.2
_MOST_FAILURES = 3
"""Of one child without an answer in between."""
_END_SECONDS = 10.0


def command_for(
    settings: ServeSection, model: Path, *, replicas: int
) -> Callable[[int], list[str]]:
    """What starts a server at a port. Raises UserError: no program, or not a model of that engine.

    llama.cpp reads a GGUF file: `model`, or the only one in it. vLLM reads a folder.
    """
    program = shutil.which(settings.program or _PROGRAMS[settings.engine])
    if program is None:
        asked = settings.program or _PROGRAMS[settings.engine]
        raise UserError(
            f"serve.engine: {settings.engine} needs {asked}, which is not there\n"
            f"    {_HOW[settings.engine]}, or give serve.program, its path"
        )
    address = ["--host", "127.0.0.1", "--port"]
    if settings.engine == "vllm":
        from shoal.serve.reading import model_directory

        folder = model_directory(model)
        name = settings.name or folder.resolve().name
        start = [program, "serve", str(folder), "--served-model-name", name]
        if settings.threads != "auto":
            raise UserError(
                "serve.threads: vLLM decides that itself; leave it out, or set "
                "VLLM_CPU_OMP_THREADS_BIND"
            )
    else:
        file = gguf_file(model)
        threads = settings.threads
        if threads == "auto":
            threads = max(1, usable_cores() // replicas)
        start = [program, "--model", str(file), "--alias", settings.name or file.stem]
        start += ["--threads", str(threads)]
    return lambda port: [*start, *address, str(port), *settings.arguments]


def gguf_file(model: Path) -> Path:
    """The GGUF file that `model` is or holds. Raises UserError."""
    found = [model] if model.is_file() else sorted(model.glob("*.gguf"))
    if len(found) != 1 or found[0].suffix != ".gguf":
        has = ", ".join(each.name for each in found) or "none"
        raise UserError(
            f"{model}: llama.cpp reads one GGUF file, and it has {has}\n"
            "    make one: shoal compress MODEL --out DIR --quantise gguf-q8_0"
        )
    return found[0]


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    port: int
    log: IO[bytes]
    ready: bool = False
    failures: int = 0
    """Ends since it was last ready."""
    given_up: bool = False


class Children:
    """Servers of another engine. A context manager: leaving it ends them."""

    def __init__(
        self, command: Callable[[int], list[str]], *, count: int, say: Callable[[str], None]
    ) -> None:
        """`command(port)` starts one."""
        self._command, self._say = command, say
        self.lost: Callable[[], None] = lambda: None
        """Called when the last of them is given up."""
        self._folder = tempfile.TemporaryDirectory(prefix="shoal-engine-")
        self._lock, self._closing = threading.Lock(), threading.Event()
        self.failed: str | None = None
        """What the first that was given up said."""
        self._children = {number: self._started(number) for number in range(count)}
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Children:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def addresses(self) -> Mapping[int, str]:
        """Those that take requests now."""
        with self._lock:
            return {n: _address(each.port) for n, each in self._children.items() if each.ready}

    def wait_ready(self) -> None:
        """Wait until all take requests. Raises RunError with what a child said that does not."""
        while len(self.addresses()) < len(self._children):
            if self.failed is not None:
                raise RunError(self.failed)
            time.sleep(_POLL_SECONDS / 4)

    def close(self) -> None:
        """End them: asked first, then at once."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        processes = [each.process for each in self._children.values()]
        for each in processes:
            each.terminate()
        deadline = time.monotonic() + _END_SECONDS
        for each in processes:
            try:
                each.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                each.kill()
                each.wait()
        for child in self._children.values():
            child.log.close()
        self._folder.cleanup()

    def _started(self, number: int, *, failures: int = 0) -> _Child:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
        log = (Path(self._folder.name) / f"{number}.log").open("wb")
        guarded = shutil.which("setpriv")  # so that none outlives us, however we end
        command = self._command(port)
        process = subprocess.Popen(
            [guarded, "--pdeathsig", "KILL", *command] if guarded else command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment_of_others(),
        )
        return _Child(process, port, log, failures=failures)

    def _watch(self) -> None:
        while not self._closing.wait(_POLL_SECONDS):
            for number, child in list(self._children.items()):
                if child.given_up:
                    continue
                if child.process.poll() is not None:
                    self._ended(number, child)
                elif not child.ready and _is_healthy(child.port):
                    with self._lock:
                        child.ready, child.failures = True, 0

    def _ended(self, number: int, child: _Child) -> None:
        """Start it again; one that cannot be started is given up."""
        status, failures = child.process.returncode, child.failures + 1
        child.log.close()
        said = Path(child.log.name).read_text(errors="replace").strip().splitlines()[-8:]
        text = "\n    ".join([f"server {number} of the engine ended (status {status}):", *said])
        if failures < _MOST_FAILURES and (child.ready or child.failures):
            self._say(f"{text}\n    it is started again")
            with self._lock:
                self._children[number] = self._started(number, failures=failures)
            return
        with self._lock:
            child.ready, child.given_up = False, True
        self.failed = self.failed or text
        self._say(f"{text}\n    it is given up")
        if all(each.given_up for each in self._children.values()):
            self.lost()


def _address(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def _is_healthy(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{_address(port)}/health", timeout=2.0) as answer:
            return int(answer.status) == 200
    except OSError:
        return False
