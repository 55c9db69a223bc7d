"""Real servers that notes and feeds come from and go to: HTTP and SMTP, in threads."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from aiosmtpd.controller import Controller


@dataclass
class Web:
    """A server that keeps what is posted, and answers as it is told."""

    url: str
    posted: list[Any] = field(default_factory=list)
    status: int = 200
    body: bytes = b""
    """What a GET gives."""


@contextmanager
def web() -> Iterator[Web]:
    """It, while it is needed."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["content-length"]))
            if made.status == 200:
                made.posted.append(json.loads(sent))
            self._answer(b"no" if made.status != 200 else b"yes")

        def do_GET(self) -> None:
            self._answer(made.body)

        def _answer(self, body: bytes) -> None:
            self.send_response(made.status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *said: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made = Web(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class Post:
    """A mail server that keeps mails; nobody@ bounces for good, busy@ for now."""

    port: int = 0
    mails: list[str] = field(default_factory=list)

    async def handle_RCPT(
        self, server: Any, session: Any, envelope: Any, address: str, options: Any
    ) -> str:
        if address.startswith("nobody@"):
            return "550 no such mailbox here"
        if address.startswith("busy@"):
            return "451 come again"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        self.mails.append(envelope.content.decode())
        return "250 OK"

    def address(self, to: str = "me@example.org") -> str:
        return f"smtp://127.0.0.1:{self.port}?from=shoal@example.org&to={to}"


@contextmanager
def post_office(port: int) -> Iterator[Post]:
    """It, while it is needed."""
    made = Post(port)
    controller = Controller(made, hostname="127.0.0.1", port=port)
    controller.start()
    try:
        yield made
    finally:
        controller.stop()
