"""Requests passed on to servers of another engine: to the one with the fewest, as they came.

A server that goes before it has begun an answer costs nothing: another is asked. One that goes in
the middle breaks the answer off, since nobody knows what the other engine would have said next.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from shoal.config.serve import Limits
from shoal.serve.http.errors import Refused
from shoal.serve.http.guard import Guard

_PATHS = ("/tokenize", "/detokenize", "/classify", "/score", "/rerank", "/pooling")
"""What is passed on beside /v1/: nothing that changes a server or shows its slots."""
_KEPT = (b"content-type", b"accept")
_CONNECT_SECONDS = 5.0


class Servers(Protocol):
    """Where requests are passed on to (launch/other_engine.py)."""

    def addresses(self) -> Mapping[int, str]:
        """Those that take requests now, by number: http://host:port."""


class _Passing:
    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._open: dict[int, int] = {}
        self._total: dict[int, int] = {}
        wait = httpx.Timeout(None, connect=_CONNECT_SECONDS)
        self._client = httpx.AsyncClient(timeout=wait, trust_env=False)

    async def passed(self, request: Request) -> Response:
        """The answer of one of them."""
        body, tried = await request.body(), set[int]()
        while True:
            ready = self._servers.addresses()
            left = [number for number in ready if number not in tried]
            if not left:
                text = "no server of the engine takes requests just now; ask again"
                return Refused(text, status=503, code="not_ready").response()
            chosen = min(left, key=lambda number: (self._open.get(number, 0), number))
            self._count(chosen, 1)
            try:
                answer = await self._ask(ready[chosen], request, body)
            except httpx.TransportError:
                self._count(chosen, -1)
                tried.add(chosen)
                continue
            except BaseException:
                self._count(chosen, -1)
                raise
            kind = answer.headers.get("content-type", "application/json")
            return StreamingResponse(
                self._relayed(chosen, answer), status_code=answer.status_code, media_type=kind
            )

    async def _ask(self, address: str, request: Request, body: bytes) -> httpx.Response:
        headers = [pair for pair in request.headers.raw if pair[0] in _KEPT]
        url = httpx.URL(address + request.url.path, query=request.url.query.encode())
        asked = self._client.build_request(request.method, url, content=body, headers=headers)
        return await self._client.send(asked, stream=True)

    async def _relayed(self, chosen: int, answer: httpx.Response) -> AsyncIterator[bytes]:
        try:
            async for piece in answer.aiter_bytes():
                yield piece
        finally:  # also when the client has gone: the engine sees that its own has
            self._count(chosen, -1)
            await answer.aclose()

    def _count(self, number: int, change: int) -> None:
        self._open[number] = self._open.get(number, 0) + change
        self._total[number] = self._total.get(number, 0) + (change > 0)

    async def health(self, request: Request) -> Response:
        """200 while one of them takes requests."""
        return Response(status_code=200 if self._servers.addresses() else 503)

    async def metrics(self, request: Request) -> Response:
        """What was passed on; ?server=N: what that server counts itself."""
        which = request.query_params.get("server")
        if which is not None:
            address = self._servers.addresses().get(int(which) if which.isdigit() else -1)
            if address is None:
                known = ", ".join(map(str, self._servers.addresses()))
                text = f"server: there is none of number {which[:20]}; there is {known}"
                return Refused(text, status=404, param="server").response()
            answer = await self._client.get(f"{address}/metrics")
            return PlainTextResponse(answer.text, status_code=answer.status_code)
        lines = ["# TYPE shoal:passed_requests counter", "# TYPE shoal:open_requests gauge"]
        for number in sorted(self._total):
            lines.append(f'shoal:passed_requests_total{{server="{number}"}} {self._total[number]}')
            lines.append(f'shoal:open_requests{{server="{number}"}} {self._open[number]}')
        return PlainTextResponse("\n".join(lines) + "\n")


def make_passing_app(
    servers: Servers, *, engine: str, keys: list[bytes], limits: Limits, version: str
) -> Any:
    """The ASGI application of servers of another engine."""
    passing = _Passing(servers)

    async def told_version(request: Request) -> Response:
        about = f"{engine}, not proved"
        return JSONResponse({"version": version, "engine": engine, "products": about})

    async def nothing(request: Request) -> Response:
        return Refused(f"there is no {request.url.path[:200]} here", status=404).response()

    both = ["GET", "POST"]
    routes = [
        Route("/health", passing.health),
        Route("/ready", passing.health),
        Route("/metrics", passing.metrics),
        Route("/version", told_version),
        Route("/v1/{rest:path}", passing.passed, methods=both),
        *(Route(path, passing.passed, methods=["POST"]) for path in _PATHS),
        Route("/{rest:path}", nothing, methods=both),
    ]
    return Guard(Starlette(routes=routes), keys=keys, limits=limits)
