"""A real S3 to save to: moto's server in a process of its own, which knows If-None-Match."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from eventually import eventually

_SERVE = "from moto.server import main; main(['-H', '{host}', '-p', '{port}'])"
_FIND = """
import json, sys, fsspec
store = fsspec.filesystem("s3")
if sys.argv[1] == "make":
    store.mkdir(sys.argv[2])
print(json.dumps(store.find(sys.argv[2], detail=False)))
"""


def serving(host: str, port: int) -> list[str]:
    """The command that serves there."""
    return [sys.executable, "-c", _SERVE.format(host=host, port=port)]


def reaching(host: str, port: int) -> dict[str, str]:
    """The environment by which clients find it."""
    return {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def asking(what: str, bucket: str) -> list[str]:
    """The command that prints the names in a bucket, as JSON; `what`: `make` it, or `find`."""
    return [sys.executable, "-c", _FIND, what, bucket]


class S3:
    """A server on this machine."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.env = reaching("127.0.0.1", self.port)
        command, none = serving("127.0.0.1", self.port), subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdout=none, stderr=none)
        eventually(self._answers)

    def _answers(self) -> bool:
        with socket.socket() as line:
            return line.connect_ex(("127.0.0.1", self.port)) == 0

    def names(self, bucket: str, *, make: bool = False) -> list[str]:
        """Of all objects there."""
        command, env = asking("make" if make else "find", bucket), {**os.environ, **self.env}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        return [name.partition("/")[2] for name in json.loads(done.stdout)]

    def fall_silent(self) -> None:
        """It takes connections, and answers nobody."""
        self.process.send_signal(signal.SIGSTOP)

    def answer_again(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def s3() -> Iterator[S3]:
    made = S3()
    try:
        yield made
    finally:
        made.close()
