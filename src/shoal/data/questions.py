"""Readers of questions and the texts that answer them, split by text.

Of each there are two: the pairs to learn from; and those held out, with all texts to search in:
`{"query", "text"}`, and only `{"text"}` of a text whose questions are learned from.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shoal.data.columns import Record, content_hash
from shoal.data.files import Report, lines_of
from shoal.data.help_pages import read_help_pages
from shoal.errors import DataError

_TERM = re.compile(r'\{url:"[^"/]*/(text/[^"?#]*)[^"]*", app:"[^"]*", text:"([^"]*)"\}')
_INDEX = "bookmarks.js"


@dataclass(frozen=True)
class Questions:
    """A reader of one of the two; every `one_in`-th text is held out, by what it says."""

    asked: Callable[[Path, Report], Iterator[tuple[list[str], Record]]]
    """Each text as a record, with its questions."""
    one_in: int
    held_out: bool

    def __call__(
        self, path: Path, *, text_field: str | None = None, at: Report = lambda done: None
    ) -> Iterator[Record]:
        """The records."""
        for questions, record in self.asked(path, at):
            is_held = content_hash({"text": record["text"]}) % self.one_in == 0
            if is_held == self.held_out:
                yield from ({**record, "query": each} for each in questions)
            if self.held_out and not (is_held and questions):
                yield record


def _help(path: Path, at: Report) -> Iterator[tuple[list[str], Record]]:
    """Pages of the help, with the terms of its index that lead there: "borders printing cells"."""
    try:
        index = (path / _INDEX).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path / _INDEX}: cannot be read ({error}); fetch it again") from error
    terms: dict[str, dict[str, None]] = {}
    for page, term in _TERM.findall(index):
        plain = " ".join(html.unescape(term).replace("--", " ").split())
        terms.setdefault(page, {})[plain] = None
    for record in read_help_pages(path, at=at):
        yield list(terms.get(record["page"], ())), record


def _faq(path: Path, at: Report) -> Iterator[tuple[list[str], Record]]:
    """Answers, with the one question of each."""
    for _, line in lines_of(path, at=at):
        if line.strip():
            row = json.loads(line)
            yield [row["q"]], {"text": row["a"], "category": row["category"]}


HELP, HELP_HELD_OUT = (Questions(_help, 5, held_out) for held_out in (False, True))
FAQ, FAQ_HELD_OUT = (Questions(_faq, 2, held_out) for held_out in (False, True))
