"""What commands and routes of all applications share: arguments, errors, fields, answers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from apps.served import NotServed
from shoal import ShoalError, UserError
from shoal.environment import language_wanted
from shoal.language import LANGUAGES, speak, translated
from shoal.page import web

BODY_BYTES = 1 << 20
OPEN_PATHS = ("/health",)


class Missing(UserError):
    """What was asked for is not there."""


class Conflict(UserError):
    """What was asked for cannot be done as things stand now."""


_STATUS = {Missing: 404, Conflict: 409, UserError: 400, NotServed: 503}


def say(line: str) -> None:
    """A line for the person at the terminal."""
    print(translated(line), flush=True)


class Parser(argparse.ArgumentParser):
    """Arguments whose help is in the language chosen."""

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As argparse has it."""
        if settings.get("help"):
            settings["help"] = translated(settings["help"])
        return super().add_argument(*names, **settings)


def parser(about: str, *, name: str) -> argparse.ArgumentParser:
    """Arguments that every application has."""
    made = Parser(prog=f"python -m apps.{name}", description=translated(about))
    made.add_argument("--lang", choices=LANGUAGES, help="en or zh_CN; else the locale's.")
    made.add_argument("--model", metavar="RUN", help="A trained run or a model folder.")
    state = Path("runs") / "apps" / name
    made.add_argument("--state", type=Path, default=state, help="Folder of what it keeps.")
    made.add_argument("--host", default="127.0.0.1", help="Any but loopback needs --key.")
    made.add_argument("--port", type=int, default=0, help="0 is any free one.")
    made.add_argument("--key", type=Path, help="A file with the key; without it a new one is made.")
    made.add_argument("--replicas", type=int, default=1, help="Processes that serve the model.")
    return made


def run(main: Callable[[], None]) -> None:
    """Run a command: a mistake of the user is one message and exit status 2."""
    asked = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    asked.add_argument("--lang")
    given, _ = asked.parse_known_args()
    wanted = given.lang if given.lang in LANGUAGES else language_wanted()
    speak(wanted, more=Path(__file__).with_name("zh_CN.po"))
    try:
        main()
    except ShoalError as error:
        print(translated(str(error)), file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)


def state_folder(given: argparse.Namespace) -> Path:
    """The folder of `--state`, made where it is not there. Raises UserError."""
    folder: Path = given.state
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--state {folder}: cannot be made ({error.strerror})") from None
    return folder


def serve(routes: Sequence[BaseRoute], given: argparse.Namespace, *, title: str) -> None:
    """Serve until a signal."""
    key = None if given.key is None else web.read_key(given.key)
    web.serve(
        application(routes),
        title=title,
        say=say,
        host=given.host,
        port=given.port,
        key=key,
        open_paths=OPEN_PATHS,
        body_bytes=BODY_BYTES,
    )


def application(routes: Sequence[BaseRoute]) -> Starlette:
    """Routes, with errors as JSON: `{"error": "what is wrong and what to do"}`."""

    async def refuse(request: Request, error: Exception) -> Response:
        status = next(_STATUS[each] for each in type(error).__mro__ if each in _STATUS)
        return JSONResponse({"error": str(error)}, status_code=status)

    return Starlette(routes=list(routes), exception_handlers={UserError: refuse, NotServed: refuse})


def pages(folder: Path, **files: str) -> list[BaseRoute]:
    """A page for each path (`queue="queue.html"`; `index` is /), and the folder's files."""
    shared = Mount("/shared", web.static_files(Path(__file__).parent / "static"))
    made: list[BaseRoute] = [Mount("/static", web.static_files(folder)), shared]
    for name, file in files.items():
        path = "/" if name == "index" else f"/{name}"
        made.append(Route(path, lambda request, file=file: FileResponse(folder / file)))
    return made


def route(
    path: str, do: Callable[..., Any], *, method: str = "POST", **wanted: type | tuple[type, Any]
) -> Route:
    """A route that calls `do` in a thread, with the path's parts and the wanted fields by name.

    `name=str` is needed, `name=(str, "")` has a default. Of GET they stand in the address.
    What `do` returns is the answer as JSON, unless it is a Response.
    """

    async def handle(request: Request) -> Response:
        given: Mapping[str, Any] = request.query_params
        if method in ("POST", "PUT") and wanted:
            given = _object(await request.body())
        fields = _checked(given, wanted, typed=method in ("POST", "PUT"))
        if any(isinstance(each, int) and each >= 1 << 63 for each in request.path_params.values()):
            raise Missing(f"{request.url.path[:80]}: there is no such number")
        found = await run_in_threadpool(do, **request.path_params, **fields)
        return found if isinstance(found, Response) else JSONResponse(found)

    return Route(path, handle, methods=[method])


def _object(body: bytes) -> Mapping[str, Any]:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise UserError("expected a JSON object as the body of the request")
    try:
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError("expected text, got half of a surrogate pair of UTF-16") from None
    return given


def _checked(
    given: Mapping[str, Any], wanted: Mapping[str, type | tuple[type, Any]], *, typed: bool
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, each in wanted.items():
        kind = each[0] if isinstance(each, tuple) else each
        if name not in given:
            if not isinstance(each, tuple):
                raise UserError(f"{name!r}: expected, and not there")
            found[name] = each[1]
            continue
        value = given[name]
        try:
            value = kind(value) if not typed or (kind is float and type(value) is int) else value
        except ValueError:
            pass
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise UserError(f"{name!r}: expected {_WORDS[kind]}, got {str(value)[:40]!r}")
        found[name] = value
    return found


_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    list: "a list",
    bool: "true or false",
}
