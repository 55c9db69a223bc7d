"""python -m apps.recommend: ranked items for a user, each with a reason."""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.routing import BaseRoute

from apps import command
from apps.command import pages, route, say
from apps.recommend.catalogue import Catalogue
from apps.recommend.shop import Shop
from apps.recommend.taste import Transformer
from apps.served import fetched

STATIC = Path(__file__).parent / "static"


def routes(shop: Shop) -> list[BaseRoute]:
    """All routes."""

    def users() -> list[dict[str, Any]]:
        asked = "select user, count(*) as taken from events group by user order by max(number) desc"
        return shop.catalogue.rows(f"{asked} limit 200")

    def put(id: str, title: str, genres: list[str], expires: float) -> dict[str, Any]:
        return asdict(shop.put(id, title=title, genres=genres, expires=expires or None))

    return [
        *pages(STATIC, index="index.html"),
        route("/health", lambda: {"ok": True}, method="GET"),
        route("/users", users, method="GET"),
        route("/users/{user:str}", shop.user, method="GET"),
        route(
            "/recommend",
            shop.recommend,
            method="GET",
            user=str,
            count=(int, 10),
            diversity=(float, 0.0),
        ),
        route("/events", shop.take, user=str, item=str),
        route(
            "/items/{id:str}", put, method="PUT", title=str, genres=(list, []), expires=(float, 0.0)
        ),
    ]


def open_shop(given: argparse.Namespace, ending: ExitStack) -> Shop:
    """The shop with its events and model; what it started ends with `ending`."""
    folder = command.state_folder(given)
    catalogue = Catalogue(folder / "recommend.sqlite3")
    ending.callback(catalogue.close)
    if not catalogue.first("select id from items limit 1"):
        source = given.data or fetched("movielens", say=say)
        say(f"reading {source}")
        catalogue.read(Path(source))
    elif given.data:
        say(f"{folder} has items already, so {given.data} is not read; give another --state for it")
    if given.model is None:
        say(
            "no --model: items are ranked by neighbours in time and by their content, without a "
            "transformer. To train one: shoal train recommend --out runs/recommend-001 (some "
            "minutes); then --model runs/recommend-001"
        )
        return Shop(catalogue, say=say)
    settings = [f"replicate={given.replicas}", "threads=1"]
    transformer = Transformer(Path(given.model), scratch=folder, settings=settings, say=say)
    ending.callback(transformer.close)
    weight, age = chosen(Path(given.model))
    say(f"the transformer counts {weight:.1f}, neighbours {1 - weight:.1f}")
    return Shop(catalogue, transformer=transformer, weight=weight, age=age, say=say)


def chosen(run: Path) -> tuple[float, float]:
    """Weight of the transformer and age of histories, as a run chose them on what it held out."""
    rows = run / "metrics.jsonl"
    for line in reversed(rows.read_text(encoding="utf-8").splitlines() if rows.is_file() else []):
        row = json.loads(line)
        if "weight" in row and "age" in row:
            return float(row["weight"]), float(row["age"])
    return 0.5, 5.0


def main() -> None:
    """Serve until a signal."""
    made = command.parser("Recommendation: what somebody may want next, and why.", name="recommend")
    made.add_argument("--data", help="NAME.inter of RecBole's form, with NAME.item beside it.")
    given = made.parse_args()
    with ExitStack() as ending:
        shop = open_shop(given, ending)
        command.serve(routes(shop), given, title="recommendation")


if __name__ == "__main__":
    command.run(main)
