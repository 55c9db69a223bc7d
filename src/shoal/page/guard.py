"""The door of a web page: who may ask, under which name, from where, and how much at once.

ASGI middleware: what may not pass is refused before the app sees it, and every answer says what a
browser may do with it.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlencode

from starlette.responses import PlainTextResponse, RedirectResponse, Response

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

HEADER = "x-shoal"
"""Every request that changes something carries it: no form and no link of another site can."""
_SAFE = ("GET", "HEAD", "OPTIONS")
_BODY_SECONDS = 10.0
STOPPING = "shoal.stopping"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    b"content-security-policy": _POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"cache-control": b"no-store",
}


class Refused(Exception):
    """A request that may not pass, and what its sender is told."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Guard:
    """ASGI middleware: who asks, under which name, from where, with how large a body.

    `hosts`: names beside localhost under which it may be asked. With 0.0.0.0 or :: among them any
    number of an address is one: a foreign page can make its own name lead here, but not a number.
    `open_paths`: those that need no key, such as a health check.
    """

    def __init__(
        self,
        app: Any,
        *,
        key: str,
        port: int,
        hosts: Sequence[str] = (),
        open_paths: Sequence[str] = (),
        body_bytes: int = 64 << 10,
    ) -> None:
        self._app, self._key, self._cookie = app, key.encode(), f"shoal-{port}"
        self._hosts = {"127.0.0.1", "localhost", "::1", *(name.lower() for name in hosts)}
        self._by_number = bool(self._hosts & {"0.0.0.0", "::"})
        self._open, self._body_bytes = frozenset(open_paths), body_bytes
        self.stopping = asyncio.Event()
        """Set when the server is about to end, so that streams end first."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """See ASGI 3."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = dict(message.get("headers", ()))
                rest = [pair for pair in _HEADERS.items() if pair[0] not in own]
                message["headers"] = [*message.get("headers", ()), *rest]
            await send(message)

        try:
            answer = self._checked(scope)
            if answer is None and scope["method"] not in _SAFE:
                receive = await self._read(receive)
        except Refused as error:
            answer = PlainTextResponse(f"{error}\n", status_code=error.status)
        scope[STOPPING] = self.stopping
        await (answer or self._app)(scope, receive, sealed)

    def _checked(self, scope: Message) -> Response | None:
        """None to go on, or an answer in place of the app's. Raises Refused."""
        headers = {
            name.decode("latin-1"): text.decode("latin-1") for name, text in scope["headers"]
        }
        host = _without_port(headers.get("host", ""))
        if not (host in self._hosts or (self._by_number and _is_number(host))):
            raise Refused(400, f"asked for as {host[:80]!r}, which is not a name of this server")
        if scope["path"] in self._open and scope["method"] in _SAFE:
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = dict(query).get("token")
        if given is not None and scope["method"] == "GET":
            return self._admitted(scope["path"], query, given=given)
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if self._is_key(bearer):
            return None  # a program: no browser adds this by itself
        if not self._is_key(_cookies(headers.get("cookie", "")).get(self._cookie, "")):
            raise Refused(403, "no key: open the address that was printed, with its token")
        came_from = headers.get("sec-fetch-site")
        if scope["method"] in _SAFE:
            foreign = came_from in ("cross-site", "same-site")
            if foreign and headers.get("sec-fetch-mode") != "navigate":
                raise Refused(403, "asked for by another site")
        elif came_from != "same-origin" or HEADER not in headers:
            raise Refused(403, f"changes come from this page alone, with the header {HEADER}")
        return None

    def _admitted(self, path: str, query: list[tuple[str, str]], *, given: str) -> Response:
        """The key becomes a cookie and leaves the address bar. Raises Refused."""
        if not self._is_key(given):
            raise Refused(403, "not the token of this server: open the address it printed last")
        rest = urlencode([pair for pair in query if pair[0] != "token"])
        # a path that begins with // would be another host
        answer = RedirectResponse(
            "/" + path.lstrip("/") + (f"?{rest}" if rest else ""), status_code=303
        )
        answer.set_cookie(self._cookie, self._key.decode(), httponly=True, samesite="strict")
        return answer

    def _is_key(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self._key)

    async def _read(self, receive: Receive) -> Receive:
        """The whole body, read while it is small enough and comes in time. Raises Refused."""
        body = b""
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                more = True
                while more:
                    message = await receive()
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self._body_bytes:
                        raise Refused(413, f"the body is larger than {self._body_bytes} bytes")
        except TimeoutError:
            raise Refused(408, f"the body did not come within {_BODY_SECONDS:g} s") from None
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Message:
            return waiting.pop() if waiting else await receive()

        return replayed


def _without_port(host: str) -> str:
    """The name in a Host header: `[::1]:80` is ::1."""
    match = re.fullmatch(r"\[([0-9a-f:.]+)\](?::\d+)?|([^:\[\]]*)(?::\d+)?", host.strip().lower())
    return (match[1] or match[2] or "") if match else host


def _is_number(host: str) -> bool:
    try:
        return bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def _cookies(header: str) -> dict[str, str]:
    pairs = (part.strip().partition("=") for part in header.split(";"))
    return {name: value for name, _, value in pairs}
