"""What an application keeps: one SQLite file, each call one transaction, from any thread."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from shoal import UserError

Row = dict[str, Any]


class State:
    """Tables, made where they are not there yet."""

    def __init__(self, path: Path, *, tables: str) -> None:
        """Raises UserError for a file that is no such database."""
        self._lock = threading.Lock()
        try:
            self._database = sqlite3.connect(path, check_same_thread=False)
            self._database.row_factory = sqlite3.Row
            with self._lock, self._database:
                self._database.execute("pragma journal_mode=wal")
                self._database.execute("pragma synchronous=normal")  # safe from a kill
                self._database.executescript(tables)
        except sqlite3.Error as error:
            raise UserError(f"{path}: cannot be used ({error}); give another --state") from None

    def rows(self, statement: str, *values: Any) -> list[Row]:
        """Run one statement, and give its rows."""
        with self._lock, self._database:
            return [dict(row) for row in self._database.execute(statement, values)]

    def first(self, statement: str, *values: Any) -> Row | None:
        """The first row, or None."""
        return next(iter(self.rows(statement, *values)), None)

    def many(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run one statement for each row, all or none."""
        with self._lock, self._database:
            self._database.executemany(statement, rows)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()
