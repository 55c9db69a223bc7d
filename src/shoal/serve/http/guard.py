"""What stands before every request: keys, and limits of the body's size and time."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from shoal.config.serve import Limits
from shoal.errors import UserError
from shoal.serve.http.errors import Refused

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_OPEN = {"/health", "/ready"}
"""Paths that need no key: a load balancer asks them."""
_ADMIN = "/admin/"
"""Paths that are for this machine alone, with a key where there are keys."""
_LOOPBACK = ("127.0.0.1", "::1")


def read_keys(path: str | None) -> list[bytes]:
    """API keys from a file, one per line; # begins a comment. Raises UserError."""
    if path is None:
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"serve.keys: {path} cannot be read: {error}") from None
    keys = [line.strip().encode() for line in lines if line.strip() and line[0] != "#"]
    if not keys:
        raise UserError(f"serve.keys: {path} has no key; write one per line")
    return keys


class Guard:
    """ASGI middleware: answers what may not pass, and counts the bytes of what does."""

    def __init__(self, app: Any, *, keys: list[bytes], limits: Limits) -> None:
        self._app, self._keys, self._limits = app, keys, limits

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """See ASGI 3."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
            body = await self._body(receive) if scope["method"] == "POST" else b""
        except Refused as error:
            await error.response()(scope, receive, send)
            return
        given = False

        async def replayed() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self._app(scope, replayed, send)

    def _check(self, scope: Message) -> None:
        headers = dict(scope["headers"])
        if self._keys and scope["path"] not in _OPEN:
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ").strip()
            # every key is compared, so that the time taken tells nothing
            matches = [hmac.compare_digest(given, key) for key in self._keys]
            if not any(matches):
                raise Refused(
                    "give a valid API key: Authorization: Bearer KEY",
                    status=401,
                    code="invalid_api_key",
                )
        client = scope.get("client") or ("", 0)
        forwarded = b"x-forwarded-for" in headers or b"forwarded" in headers
        if scope["path"].startswith(_ADMIN) and (client[0] not in _LOOPBACK or forwarded):
            raise Refused(f"{scope['path']}: only from this machine", status=403, code="not_local")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._limits.body_bytes:
            raise self._too_large()

    async def _body(self, receive: Receive) -> bytes:
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise Refused("the client went away", status=400)
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._limits.body_bytes:
                        raise self._too_large()
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            seconds = self._limits.body_seconds
            raise Refused(f"the body did not come within {seconds:g} s", status=408) from None

    def _too_large(self) -> Refused:
        most = self._limits.body_bytes
        return Refused(f"the body is larger than {most} bytes", status=413, code="body_too_large")
