"""Readers of interactions: who took what, and when; one record per user."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shoal.data.files import Report, lines_of
from shoal.errors import DataError, nearest

Record = dict[str, Any]

_COLUMNS = ("user_id", "item_id", "timestamp")


def read_interactions(
    path: Path, *, text_field: str | None = None, at: Report = lambda done: None
) -> Iterator[Record]:
    """A `.inter` file of RecBole: `{"user", "items": [oldest first], "texts": [...]}` per user.

    Tab-separated; the first line names the columns (`user_id:token`; what stands behind the colon
    is not read), of which user_id, item_id and timestamp are needed. Interactions of one time keep
    the order of the file. `texts` say what each item is, where a `.item` file of the same name
    lies beside: all its columns but the id, such as title, year and genres.
    Raises DataError with the line that is wrong.
    """
    lines = _rows(path, needed=_COLUMNS, at=at)
    texts = _texts(path.with_suffix(".item"))
    taken: dict[str, list[tuple[float, str]]] = {}
    for where, row in lines:
        try:
            time = float(row["timestamp"])
        except ValueError:
            time = math.nan
        if not math.isfinite(time):
            raise DataError(
                f"{where}: expected a number in 'timestamp', got {row['timestamp'][:40]!r}; mend "
                "or remove that line"
            )
        taken.setdefault(row["user_id"], []).append((time, row["item_id"]))
    for user, found in taken.items():
        items = [item for _, item in sorted(found, key=lambda each: each[0])]
        yield {"user": user, "items": items, "texts": [texts.get(item, "") for item in items]}


def _texts(path: Path) -> dict[str, str]:
    """What each item is, by its id; empty where there is no such file."""
    if not path.is_file():
        return {}
    return {
        row["item_id"]: " ".join(value for name, value in row.items() if name != "item_id")
        for _, row in _rows(path, needed=("item_id",))
    }


def _rows(
    path: Path, *, needed: tuple[str, ...], at: Report = lambda done: None
) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a tab-separated file by the names of their columns, each with its place."""
    names: list[str] = []
    for number, line in lines_of(path, at=at):
        cells = line.split("\t")
        where = f"{path}: line {number}"
        if not names:
            names = [cell.partition(":")[0].strip() for cell in cells]
            missing = next((name for name in needed if name not in names), None)
            if missing is not None:
                raise DataError(
                    f"{where}: expected columns {', '.join(needed)} parted by tabs, got "
                    f"{', '.join(name[:40] for name in names)}; {nearest(missing, names)}"
                )
        elif line.strip():
            if len(cells) != len(names):
                raise DataError(
                    f"{where}: expected {len(names)} cells parted by tabs, got {len(cells)}; mend "
                    "or remove that line"
                )
            yield where, dict(zip(names, cells))
