"""What customer service knows and has said: articles, vectors, conversations, hand-offs, drafts."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apps.state import Row, State
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


class Store(State):
    """See the tables."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, tables=_TABLES)

    def articles(self) -> list[Article]:
        """All, by their ids."""
        return [Article(**row) for row in self.rows("select * from articles order by id")]

    def put(self, articles: Iterable[Article]) -> None:
        """Add or replace."""
        rows = ((each.id, each.title, each.text, each.link) for each in articles)
        self.many("replace into articles values (?, ?, ?, ?)", rows)

    def vectors(self, texts: Sequence[str], *, model: str) -> list[Any]:
        """The vectors of texts by a model; None of those that are not known."""
        known = {row["key"]: row["vector"] for row in self.rows("select * from vectors")}
        found = [known.get(_key(text, model=model)) for text in texts]
        return [None if each is None else np.frombuffer(each, np.float32) for each in found]

    def keep_vectors(self, texts: Sequence[str], found: Any, *, model: str) -> None:
        """Remember vectors [N, D] of N texts."""
        keys = (_key(text, model=model) for text in texts)
        rows = zip(keys, (np.float32(vector).tobytes() for vector in found))
        self.many("replace into vectors values (?, ?)", rows)

    def note(self, name: str, value: str) -> None:
        """Remember one word of the whole."""
        self.rows("replace into meta values (?, ?)", name, value)

    def noted(self, name: str) -> str:
        """It, or nothing."""
        found = self.first("select value from meta where name = ?", name)
        return str(found["value"]) if found else ""

    def say(self, conversation: str, *, who: str, text: str, article: str = "") -> int:
        """Add a line to a conversation: `who` is customer, service or person."""
        added = self.first(
            "insert into lines (conversation, who, text, article, at) values (?, ?, ?, ?, ?) "
            "returning number",
            *(conversation, who, text, article, time.time()),
        )
        return int(added["number"]) if added else 0

    def lines(self, conversation: str, *, after: int = 0) -> list[Row]:
        """What was said behind a line."""
        asked = "select * from lines where conversation = ? and number > ? order by number"
        return self.rows(asked, conversation, after)

    def handoff(self, conversation: str) -> Row | None:
        """The hand-off of a conversation that is not solved."""
        asked = "select * from handoffs where conversation = ? and state != ?"
        return self.first(asked, conversation, SOLVED)

    def handoffs(self) -> list[Row]:
        """The queue, the oldest first."""
        return self.rows("select * from handoffs where state != ? order by number", SOLVED)

    def open_handoff(self, conversation: str, *, question: str) -> Row | None:
        """A new one, or the one there is."""
        self.rows(
            "insert into handoffs (conversation, state, question, person, at) "
            "select ?, ?, ?, '', ? "
            "where not exists (select 1 from handoffs where conversation = ? and state != ?)",
            *(conversation, OPEN, question, time.time(), conversation, SOLVED),
        )
        return self.handoff(conversation)

    def move(self, number: int, *, state: str, person: str = "") -> Row | None:
        """Take or solve a hand-off; None where it is not in the state before.

        What a person said in a solved one becomes a draft.
        """
        found = self.first(
            "update handoffs set state = ?, person = coalesce(nullif(?, ''), person) "
            "where number = ? and state = ? returning *",
            *(state, person, number, {TAKEN: OPEN, SOLVED: TAKEN}[state]),
        )
        said = [] if found is None else self.lines(found["conversation"])
        text = "\n".join(row["text"] for row in said if row["who"] == "person")
        if found and state == SOLVED and text:
            values = (found["question"][:300], text, time.time())
            self.rows("insert into drafts (title, text, at) values (?, ?, ?)", *values)
        return found

    def drafts(self) -> list[Row]:
        """Articles that solved hand-offs would make."""
        return self.rows("select * from drafts order by number")

    def drop_draft(self, number: int) -> Row | None:
        """Take a draft out: it was made an article, or is none."""
        return self.first("delete from drafts where number = ? returning *", number)


def _key(text: str, *, model: str) -> str:
    return hashlib.blake2b(f"{model}\n{text}".encode(), digest_size=16).hexdigest()
