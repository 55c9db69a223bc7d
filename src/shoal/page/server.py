"""The live page of runs: its routes, and `show`, which serves it until a signal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from shoal.errors import UserError
from shoal.page import shelf, web
from shoal.page.feed import Feed
from shoal.page.shelf import Shelf

STATIC = Path(__file__).parent / "static"


def make_app(runs: Shelf) -> Starlette:
    """The page's app; stands behind a Guard (`web.serve`)."""

    async def index(request: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    async def stream(request: Request) -> Response:
        names = request.query_params.getlist("run")
        resumed = web.resumed_from(request) or request.query_params.get("from", "")
        return web.EventStream(Feed(runs, names, resumed=resumed).poll)

    def picture(request: Request) -> Response:
        asked = request.query_params
        folder = runs.find(asked.get("run", ""))
        path = folder and shelf.picture(folder, asked.get("name", ""))
        if not path:
            return PlainTextResponse("no such picture\n", status_code=404)
        return FileResponse(path, media_type="image/png")

    async def order(request: Request) -> Response:
        try:
            asked: Any = json.loads(await request.body())
            folder = runs.find(str(asked["run"]))
            word = str(asked["order"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return PlainTextResponse("expected a run and an order\n", status_code=400)
        if folder is None:
            return PlainTextResponse("no such run any more\n", status_code=404)
        try:
            shelf.leave_order(folder, word)
        except UserError as error:
            return PlainTextResponse(f"{error}\n", status_code=409)
        return JSONResponse({"left": word})

    return Starlette(
        routes=[
            Route("/", index),
            Route("/stream", stream),
            Route("/picture", picture),
            Route("/order", order, methods=["POST"]),
            Mount("/static", web.static_files(STATIC)),
        ]
    )


def show(root: Path, *, say: Callable[[str], None], **how: Any) -> None:
    """Serve the page of the runs below `root` until a signal. `how`: see `web.serve`.

    Raises RunError where there are none, and UserError for an address that cannot be had.
    """
    runs = Shelf(root)
    web.serve(make_app(runs), title=f"{len(runs.runs())} runs of {root}", say=say, **how)
