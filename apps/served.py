"""A model served by `shoal serve` as a child of an application, and what is asked of it.

The child is started again when it ends, and a question waits for it meanwhile: an application
answers nobody with an error because its model was restarted. Knows no application.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from numpy.typing import NDArray

from shoal import ModelError, ShoalError, UserError

Floats = NDArray[np.float32]

START_SECONDS = 300.0
_ENDING_SECONDS = 20.0
_RETRY_SECONDS = 60.0
_LIBC = ctypes.CDLL(None)
_AT_ONCE = 32  # texts of one request


class NotServed(ShoalError):
    """The model cannot be asked now; what was asked may be asked again."""


class Served:
    """A model folder, or a run that has one, behind `shoal serve`; or the address of a server."""

    def __init__(
        self,
        model: Path | str,
        *,
        settings: Sequence[str] = (),
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Starts the server and waits for it. Raises ModelError with what it said."""
        self._say, self._child = say, None
        self._model = str(model)
        self._ending, self._ready = threading.Event(), threading.Event()
        self._known: dict[str, Any] = {}
        if str(model).startswith(("http://", "https://")):
            if not is_address(str(model)):
                raise UserError(f"--model {model}: no address; expected http://HOST:PORT")
            self.address = str(model).rstrip("/").removesuffix("/v1")
        else:
            port = free_port()
            self.address = f"http://127.0.0.1:{port}"
            program = shutil.which("shoal", path=str(Path(sys.executable).parent)) or "shoal"
            self._command = [program, "serve", str(model), f"port={port}", *settings]
            self._child = self._start()
        self._client = httpx.Client(base_url=self.address, timeout=httpx.Timeout(120.0))
        try:
            self._wait_ready()
            self._ready.set()
        except BaseException:
            self.close()
            raise
        if self._child is not None:
            threading.Thread(target=self._supervise, daemon=True).start()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE if self._child is None else subprocess.DEVNULL,
            text=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )

    def _wait_ready(self) -> None:
        said: list[str] = []
        if self._child is not None:
            threading.Thread(target=self._listen, args=(said,), daemon=True).start()
        until = time.monotonic() + (START_SECONDS if self._child else _RETRY_SECONDS)
        while time.monotonic() < until:
            if self._child is not None and self._child.poll() is not None:
                time.sleep(0.2)  # for its last lines
                told = "\n".join(said[-8:]) or f"it ended with status {self._child.returncode}"
                raise ModelError(f"the model's server did not start:\n{told}")
            if self._answers():
                return
            time.sleep(0.2)
        raise ModelError(f"{self.address}: no model's server answers there; start it, or name one")

    def _listen(self, said: list[str]) -> None:
        assert self._child is not None and self._child.stderr is not None
        with self._child.stderr as lines:
            for line in lines:
                said.append(line.rstrip())

    def _supervise(self) -> None:
        while not self._ending.wait(0.5):
            if self._child is not None and self._child.poll() is not None:
                self._ready.clear()
                self._say("the model's server ended; starting it again")
                self._child = self._start()
                self._ending.wait(2.0)  # not faster than this, whatever ends it
            elif not self._ready.is_set() and self._answers():
                self._ready.set()

    def _answers(self) -> bool:
        try:
            return self._client.get("/ready", timeout=5.0).status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def pid(self) -> int | None:
        """Of the child."""
        return None if self._child is None else self._child.pid

    def ask(
        self, route: str, body: dict[str, Any], *, patience: float | None = None
    ) -> dict[str, Any]:
        """What the server says to a POST. Raises UserError for what it refuses, or NotServed.

        Without `patience` it waits where the server is full or being started again; with it, at
        most so many seconds for a server that runs, and for one that does not not at all.
        """
        until = time.monotonic() + (patience or _RETRY_SECONDS)
        why = "it is being started again"
        while (left := until - time.monotonic()) > 0 and not self._ending.is_set():
            if not self._ready.wait(0 if patience else left):
                break
            try:
                answer = self._client.post(route, json=body, timeout=left)
            except httpx.HTTPError as error:
                why = str(error) or type(error).__name__
                if self._child is not None and self._child.poll() is not None:
                    self._ready.clear()
            else:
                if answer.status_code == 200:
                    found: dict[str, Any] = answer.json()
                    return found
                why = answer.text[:300]
                if answer.status_code < 500 and answer.status_code != 429:
                    raise UserError(f"the model's server refuses this: {why}")
            time.sleep(0.1)
        raise NotServed(f"the model's server does not answer: {why}")

    def name(self) -> str:
        """What its clients call the model."""
        if "name" not in self._known:
            listed = self._client.get("/v1/models").json()["data"]
            self._known["name"] = str(listed[0]["id"])
        return str(self._known["name"])

    def labels(self) -> list[str]:
        """Classes by name, from the model's folder; empty where only its address is known."""
        for path in (Path(self._model) / "model", Path(self._model)):
            if (path / "config.json").is_file():
                config = json.loads((path / "config.json").read_text(encoding="utf-8"))
                return [str(each) for each in (config.get("id2label") or {}).values()]
        return []

    def embeddings(
        self, inputs: Sequence[str] | Sequence[list[int]], *, patience: float | None = None
    ) -> Floats:
        """Vectors [N, D] of length 1 of texts, or of rows of tokens."""
        found: list[list[float]] = []
        for first in range(0, len(inputs), _AT_ONCE):
            part = list(inputs[first : first + _AT_ONCE])
            body = {"model": self.name(), "input": part}
            answer = self.ask("/v1/embeddings", body, patience=patience)
            found += [each["embedding"] for each in answer["data"]]
        return np.array(found, dtype=np.float32)

    def classes(self, texts: Sequence[str]) -> list[tuple[str, list[float]]]:
        """The likeliest class of each text, and the probabilities of all."""
        if not texts:
            return []
        answer = self.ask("/classify", {"model": self.name(), "input": list(texts)})
        return [(each["label"], each["probs"]) for each in answer["data"]]

    def chat(self, messages: Sequence[dict[str, str]], *, tokens: int) -> str:
        """An answer, the likeliest."""
        body = {"model": self.name(), "messages": list(messages), "temperature": 0}
        answer = self.ask("/v1/chat/completions", {**body, "max_tokens": tokens})
        return str(answer["choices"][0]["message"]["content"])

    def close(self) -> None:
        """End the child, after what it is answering."""
        self._ending.set()
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(_ENDING_SECONDS)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
        self._client.close()


def _end_with_parent() -> None:
    """An application that is killed leaves no server behind (PR_SET_PDEATHSIG, Linux)."""
    _LIBC.prctl(1, signal.SIGTERM)


def fetched(name: str, *, say: Callable[[str], None]) -> Path:
    """Where an entry of `shoal data list` lies, fetched if it is not there. Raises UserError."""
    program = shutil.which("shoal", path=str(Path(sys.executable).parent)) or "shoal"
    say(f"looking for {name} in the cache (shoal data get {name})")
    found = subprocess.run([program, "data", "get", name], capture_output=True, text=True)
    if found.returncode:
        raise UserError(f"{name} could not be fetched:\n{found.stderr.strip()[-500:]}")
    return Path(found.stdout.strip().splitlines()[-1])


def is_address(text: str) -> bool:
    """Whether it names a host, and a port that there can be, if any: `scheme://HOST[:PORT]...`."""
    try:
        parts = urlsplit(text)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
