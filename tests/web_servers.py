"""Web servers of tests: started as processes of their own, found by the address they print."""

from __future__ import annotations

import http.client
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a server has said to one request."""

    status: int
    headers: dict[str, str]
    body: str


@dataclass
class WebServer:
    """A running server."""

    process: subprocess.Popen[str]
    host: str
    port: int
    token: str

    @property
    def address(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def cookie(self) -> dict[str, str]:
        """The header of a browser that was let in."""
        return {"Cookie": f"shoal-{self.port}={self.token}"}

    def ask(self, path: str = "/", *, method: str = "GET", body: Any = None, **more: str) -> Answer:
        """One request with just these headers: HOST becomes Host, X_SHOAL x-shoal."""
        headers = {name.replace("_", "-"): value for name, value in more.items()}
        connection = http.client.HTTPConnection(self.host, self.port, timeout=10)
        try:
            connection.request(method, path, body=body, headers=headers)
            found = connection.getresponse()
            names = {name.lower(): value for name, value in found.getheaders()}
            return Answer(found.status, names, found.read().decode())
        finally:
            connection.close()


@contextmanager
def web_server(*command: str, **keywords: Any) -> Iterator[WebServer]:
    """Start `command`, and end it: the address is the first that it prints."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **keywords
    )
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            found = re.search(r"http://([\d.]+):(\d+)/\?token=([\w-]+)", line)
            if found:
                yield WebServer(process, found[1], int(found[2]), found[3])
                return
        raise AssertionError(f"no address: {said}")
    finally:
        process.kill()
        process.communicate()
