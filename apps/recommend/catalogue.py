"""Items and who took them, in SQLite; read from RecBole's tables (.inter, .item) to begin with."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.command import Missing
from apps.state import State
from shoal import UserError

_TABLES = """
create table if not exists items (id text primary key, title text, genres text, expires real);
create table if not exists events (number integer primary key, user text, item text, at real);
create index if not exists by_user on events (user, at, number);
"""


@dataclass(frozen=True)
class Item:
    """What can be taken."""

    id: str
    title: str
    genres: tuple[str, ...] = ()
    expires: float | None = None
    """From then on (seconds since 1970) it is not shown; None: never."""


class Catalogue(State):
    """See the tables."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, tables=_TABLES)

    def items(self) -> list[Item]:
        """All, expired ones too, in the order in which they came."""
        rows = self.rows("select * from items order by rowid")
        return [Item(**{**row, "genres": tuple(row["genres"].split("|"))}) for row in rows]

    def put(self, items: Iterator[Item] | list[Item]) -> None:
        """Add, or replace what an item is."""
        self.many(
            "insert into items values (?, ?, ?, ?) on conflict (id) do update set "
            "title = excluded.title, genres = excluded.genres, expires = excluded.expires",
            ((each.id, each.title, "|".join(each.genres), each.expires) for each in items),
        )

    def histories(self) -> dict[str, list[str]]:
        """The items of each user, the oldest first."""
        found: dict[str, list[str]] = {}
        for row in self.rows("select user, item from events order by at, number"):
            found.setdefault(row["user"], []).append(row["item"])
        return found

    def history(self, user: str) -> list[str]:
        """Of one user; empty for one who is not known."""
        asked = "select item from events where user = ? order by at, number"
        return [row["item"] for row in self.rows(asked, user)]

    def take(self, user: str, item: str) -> float:
        """A user takes an item now. Raises Missing for an item that is not there, UserError."""
        if not user.strip() or len(user) > 100:
            raise UserError("'user': expected a name of 1 to 100 characters")
        if self.first("select id from items where id = ?", item) is None:
            raise Missing(f"there is no item {item[:60]!r}; PUT /items/{item[:60]} makes it one")
        at = time.time()
        self.rows("insert into events (user, item, at) values (?, ?, ?)", user, item, at)
        return at

    def read(self, interactions: Path) -> None:
        """Fill it from NAME.inter, and NAME.item beside it. Raises UserError with the line."""
        described = interactions.with_suffix(".item")
        titles = {row["item_id"]: row for row in _table(described)} if described.is_file() else {}
        events = []
        for row in _table(interactions):
            try:
                events.append((row["user_id"], row["item_id"], float(row["timestamp"])))
            except (KeyError, ValueError):
                raise UserError(
                    f"{interactions}: expected the columns user_id, item_id and timestamp, a "
                    f"number, parted by tabs; got {str(row)[:80]}"
                ) from None
        names = dict.fromkeys([*titles, *(item for _, item, _ in events)])
        self.put([_item(name, titles.get(name, {})) for name in names])
        self.many("insert into events (user, item, at) values (?, ?, ?)", events)


def _item(name: str, row: dict[str, Any]) -> Item:
    title = next((text for key, text in row.items() if "title" in key), "") or name
    genres = next((text for key, text in row.items() if key in ("class", "genres", "genre")), "")
    return Item(name, title, tuple(genres.split()))


def _table(path: Path) -> Iterator[dict[str, str]]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            names = [cell.partition(":")[0].strip() for cell in next(rows, [])]
            for cells in rows:
                yield dict(zip(names, cells))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
