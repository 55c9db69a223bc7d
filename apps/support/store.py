"""What customer service knows and has said, in SQLite: articles, vectors, conversations, hand-offs."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apps.support.articles import Article

_TABLES = """
create table if not exists articles (id text primary key, title text, text text, link text);
create table if not exists vectors (key text primary key, vector blob);
create table if not exists meta (name text primary key, value text);
create table if not exists lines (number integer primary key, conversation text, who text,
  text text, article text, at real);
create index if not exists by_conversation on lines (conversation, number);
create table if not exists handoffs (number integer primary key, conversation text, state text,
  question text, person text, at real);
create table if not exists drafts (number integer primary key, title text, text text, at real);
"""
OPEN, TAKEN, SOLVED = "open", "taken", "solved"


class Store:
    """One file; every call is one transaction, from any thread."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, check_same_thread=False)
        self._database.row_factory = sqlite3.Row
        self._lock = threading.Lock()
        with self._lock, self._database:
            self._database.execute("pragma journal_mode=wal")
            self._database.executescript(_TABLES)

    def _do(self, statement: str, *values: Any) -> list[dict[str, Any]]:
        with self._lock, self._database:
            return [dict(row) for row in self._database.execute(statement, values)]

    def articles(self) -> list[Article]:
        """All, by their ids."""
        return [Article(**row) for row in self._do("select * from articles order by id")]

    def put(self, articles: Iterable[Article]) -> None:
        """Add or replace."""
        rows = [(each.id, each.title, each.text, each.link) for each in articles]
        with self._lock, self._database:
            self._database.executemany("replace into articles values (?, ?, ?, ?)", rows)

    def remove(self, name: str) -> bool:
        """Whether it was there."""
        return bool(self._do("delete from articles where id = ? returning id", name))

    def vectors(self, texts: Sequence[str], *, model: str) -> list[np.ndarray[Any, Any] | None]:
        """The vectors of texts by a model, as far as they are known."""
        known = {
            row["key"]: np.frombuffer(row["vector"], np.float32)
            for row in self._do("select * from vectors")
        }
        return [known.get(_key(text, model=model)) for text in texts]

    def keep_vectors(self, texts: Sequence[str], found: Any, *, model: str) -> None:
        """Remember vectors [N, D] of N texts."""
        rows = [(_key(text, model=model), np.float32(v).tobytes()) for text, v in zip(texts, found)]
        with self._lock, self._database:
            self._database.executemany("replace into vectors values (?, ?)", rows)

    def note(self, name: str, value: str) -> None:
        """Remember one word of the whole."""
        self._do("replace into meta values (?, ?)", name, value)

    def noted(self, name: str) -> str:
        """It, or nothing."""
        rows = self._do("select value from meta where name = ?", name)
        return str(rows[0]["value"]) if rows else ""

    def say(self, conversation: str, *, who: str, text: str, article: str = "") -> int:
        """Add a line to a conversation: `who` is customer, service or person."""
        rows = self._do(
            "insert into lines (conversation, who, text, article, at) values (?, ?, ?, ?, ?) "
            "returning number",
            *(conversation, who, text, article, time.time()),
        )
        return int(rows[0]["number"])

    def lines(self, conversation: str, *, after: int = 0) -> list[dict[str, Any]]:
        """What was said behind a line."""
        return self._do(
            "select * from lines where conversation = ? and number > ? order by number",
            *(conversation, after),
        )

    def hand_off(self, conversation: str, *, question: str) -> dict[str, Any]:
        """The hand-off of a conversation that is not solved: a new one, or the one there is."""
        found = self.handoff_of(conversation)
        if found is None:
            self._do(
                "insert into handoffs (conversation, state, question, person, at) "
                "values (?, ?, ?, '', ?)",
                *(conversation, OPEN, question, time.time()),
            )
            found = self.handoff_of(conversation)
        assert found is not None
        return found

    def handoff_of(self, conversation: str) -> dict[str, Any] | None:
        """The one that is not solved."""
        rows = self._do(
            "select * from handoffs where conversation = ? and state != ?", conversation, SOLVED
        )
        return rows[0] if rows else None

    def handoffs(self) -> list[dict[str, Any]]:
        """The queue, the oldest first."""
        return self._do("select * from handoffs where state != ? order by number", SOLVED)

    def move(self, number: int, *, state: str, person: str = "") -> dict[str, Any] | None:
        """Take or solve a hand-off; None where it is not in the state before."""
        before = {TAKEN: OPEN, SOLVED: TAKEN}[state]
        rows = self._do(
            "update handoffs set state = ?, person = case when ? = '' then person else ? end "
            "where number = ? and state = ? returning *",
            *(state, person, person, number, before),
        )
        if rows and state == SOLVED:
            self._draft(rows[0])
        return rows[0] if rows else None

    def _draft(self, handoff: dict[str, Any]) -> None:
        said = [row["text"] for row in self.lines(handoff["conversation"]) if row["who"] == "person"]
        if said:
            self._do(
                "insert into drafts (title, text, at) values (?, ?, ?)",
                *(handoff["question"][:300], "\n".join(said), time.time()),
            )

    def drafts(self) -> list[dict[str, Any]]:
        """Articles that solved hand-offs would make."""
        return self._do("select * from drafts order by number")

    def drop_draft(self, number: int) -> dict[str, Any] | None:
        """Take a draft out: it was made an article, or is none."""
        rows = self._do("delete from drafts where number = ? returning *", number)
        return rows[0] if rows else None

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def _key(text: str, *, model: str) -> str:
    return hashlib.blake2b(f"{model}\n{text}".encode(), digest_size=16).hexdigest()
