"""A small web server for the people of one machine: serve, event streams, keys. Knows no runs.

`serve` binds, puts a `Guard` (page/guard.py) before any ASGI app, prints the address with its key
and runs until a signal. The live page and applications are such apps.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import secrets
import signal
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from shoal.errors import UserError
from shoal.page.guard import STOPPING, Guard, Message, Receive, Send

KEY = re.compile(r"[A-Za-z0-9_-]{16,}")
_QUIET_SECONDS = 15.0
"""A stream with nothing to say still says so, or nobody would notice a connection that is gone."""


_RETRY = b"retry: 1000\n\n"
"""How soon a browser that has lost the server tries again, in milliseconds."""


@dataclass(frozen=True)
class Event:
    """One message of an event stream."""

    data: Any
    """Anything that JSON has words for."""
    id: str = ""
    """Where to go on; the browser sends the last one back when it comes again."""
    name: str = "message"

    def encoded(self) -> bytes:
        """As it crosses the wire: lines, then an empty one."""
        lines = [f"event: {self.name}", *([f"id: {self.id}"] if self.id else [])]
        return "\n".join([*lines, f"data: {json.dumps(self.data)}", "", ""]).encode()


class EventStream(Response):
    """An answer without an end: `poll` is asked, in a thread, for what is new.

    It ends when the client leaves or the server stops. The server keeps no state: `poll` begins
    where `resumed_from(request)` says.
    """

    def __init__(self, poll: Callable[[], Iterable[Event]], *, every_seconds: float = 0.25) -> None:
        super().__init__()
        self._poll, self._every = poll, every_seconds

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """See ASGI 3."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": _RETRY, "more_body": True})
        ends = [asyncio.ensure_future(_left(receive))]
        if STOPPING in scope:
            ends.append(asyncio.ensure_future(scope[STOPPING].wait()))
        quiet = 0.0
        try:
            while not any(each.done() for each in ends):
                new = await run_in_threadpool(lambda: [each.encoded() for each in self._poll()])
                quiet = 0.0 if new else quiet + self._every
                if quiet >= _QUIET_SECONDS:
                    new, quiet = [b": nothing new\n\n"], 0.0
                for piece in new:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await asyncio.wait(ends, timeout=self._every, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in ends:
                each.cancel()
        await send({"type": "http.response.body", "body": b""})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def resumed_from(request: Any) -> str:
    """The id of the last event that this browser has had; empty when it asks for the first time."""
    return str(request.headers.get("last-event-id", ""))


def resumed_at(request: Any, *, default: int = 0) -> int:
    """As `resumed_from`, where ids are numbers; `default` for what is none of ours."""
    last = resumed_from(request)
    return int(last) if last.isascii() and last.isdigit() and len(last) < 19 else default


def static_files(folder: Path) -> StaticFiles:
    """An app with the files of `folder`, to be mounted; no link leads out of it."""
    return StaticFiles(directory=folder)


def read_key(path: Path) -> str:
    """A key from the first line of a file. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--key {path}: cannot be read: {error}") from None
    if not lines or not KEY.fullmatch(lines[0].strip()):
        raise UserError(
            f"--key {path}: expected 16 or more letters, digits, - or _ in its first line\n"
            "    make one: python3 -c 'import secrets; print(secrets.token_urlsafe(24))'"
        )
    return lines[0].strip()


def listen(host: str, port: int, *, key: str | None) -> socket.socket:
    """The socket of a server, taking connections; port 0 is any free one. Raises UserError.

    Other machines may reach it only where the user has given a key.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, OverflowError) as error:
        raise UserError(f"{host}:{port}: not an address of this machine: {error}") from None
    family, _, _, _, address = found[0]
    if key is None and not ipaddress.ip_address(address[0]).is_loopback:
        raise UserError(
            f"--host {host}: other machines could reach it, and there is no --key\n"
            "    give --key FILE; or leave --host out, and come by a tunnel: ssh -L"
        )
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
        made.listen(128)
    except OSError as error:
        made.close()
        raise UserError(
            f"{host}:{port}: cannot be had: {error.strerror}\n"
            "    choose another --port, or 0 for any free one"
        ) from None
    return made


class _Server(uvicorn.Server):
    """Ends its streams before it waits for connections to end; else it would wait for ever."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.stopping.set()  # type: ignore[union-attr]
        await super().shutdown(sockets)


def serve(
    app: Any,
    *,
    title: str,
    say: Callable[[str], None],
    host: str = "127.0.0.1",
    port: int = 0,
    key: str | None = None,
    hosts: Sequence[str] = (),
    open_paths: Sequence[str] = (),
    body_bytes: int = 64 << 10,
) -> None:
    """Serve `app` behind a `Guard` until SIGTERM or SIGINT, and end within two seconds.

    `key`: the user's own, without which only this machine is listened to and a new one is made,
    which the printed address has. Raises UserError, see `listen`.
    """
    with listen(host, port, key=key) as listening:
        at, number = listening.getsockname()[:2]
        own = (host, at, socket.gethostname(), *hosts)
        secret = key or secrets.token_urlsafe(24)
        guard = Guard(
            app, key=secret, port=number, hosts=own, open_paths=open_paths, body_bytes=body_bytes
        )
        shown = "YOUR-KEY" if key else secret
        name = f"[{host}]" if ":" in host else host
        say(f"{title}: http://{name}:{number}/?token={shown}")
        chosen = uvicorn.Config(
            guard,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=1,
        )
        # uvicorn answers a signal by ending in order, and then raises it again: not to us
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, lambda *_: None)
        _Server(chosen).run(sockets=[listening])
