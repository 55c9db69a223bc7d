"""Articles and questions: from a registry entry, a folder of Markdown and HTML, or a table."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shoal
from apps.texts import html_lines, markdown_lines, words_of

TITLES = 3
"""Times that a title's words count."""

NAME = re.compile(r"\w[\w./-]{0,199}")
"""What an article may be called."""

_READERS = {".md": markdown_lines, ".txt": markdown_lines, ".html": html_lines, ".htm": html_lines}


@dataclass(frozen=True)
class Article:
    """A text that may be quoted: a line for each paragraph."""

    id: str
    title: str
    text: str
    link: str = ""

    @property
    def paragraphs(self) -> list[str]:
        """Of the text, without the title where it stands there too."""
        found = [line.strip() for line in self.text.splitlines() if line.strip()]
        return found[1:] if found[:1] == [self.title] and len(found) > 1 else found

    @property
    def beginning(self) -> str:
        """What the encoder reads, as in its training: the title and the first lines."""
        return (self.text if self.text.startswith(self.title) else f"{self.title}\n{self.text}")[
            :400
        ]

    @property
    def words(self) -> list[str]:
        """All words, those of the title thrice."""
        return words_of(self.text) + words_of(self.title) * (TITLES - 1)


def read_articles(source: str) -> Iterator[Article]:
    """Articles of a folder (.md, .html, .txt below it), a table, or a name of `shoal data list`.

    Tables have `title` and `text` (or `question` and `answer`), and may have `id` and `link`.
    Raises UserError, also for a source without any text.
    """
    path, count = Path(source).expanduser(), 0
    for article in _of_folder(path) if path.is_dir() else _of_records(source):
        if article.text.strip():
            count += 1
            yield article
    if not count:
        raise shoal.UserError(
            f"{source}: no article with text in it\n    expected .md, .html or .txt files below a "
            "folder, or a table with the columns title and text"
        )


def _of_folder(folder: Path) -> Iterator[Article]:
    for path in sorted(folder.rglob("*")):
        read = _READERS.get(path.suffix.lower())
        if read is None or not path.is_file():
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise shoal.UserError(f"{path}: a link that leads out of {folder}; name that folder")
        try:
            title, lines = read(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise shoal.UserError(f"{path}: cannot be read as UTF-8 ({error})") from None
        yield Article(path.relative_to(folder).as_posix(), title[:300], "\n".join(lines))


def _of_records(source: str) -> Iterator[Article]:
    for number, record in enumerate(_records(source), 1):
        text = str(record.get("answer") or record.get("text") or "")
        title = str(record.get("title") or record.get("question") or text[:80])
        name = str(record.get("id") or record.get("page") or number)
        yield Article(name, title, text, str(record.get("link") or ""))


def _records(source: str) -> Iterable[dict[str, Any]]:
    if Path(source).suffix.lower() != ".csv":
        return shoal.records(source)
    try:
        with open(source, encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise shoal.UserError(f"{source}: cannot be read as a table ({error})") from None


def read_questions(source: str) -> list[tuple[str, str]]:
    """(question, id of the article that answers it): what the threshold is found with."""
    rows = (
        (r.get("query") or r.get("question"), r.get("id") or r.get("page"))
        for r in _records(source)
    )
    pairs = [(str(question), str(name)) for question, name in rows if question and name]
    if not pairs:
        raise shoal.UserError(f"{source}: expected the columns question and id, got no such row")
    return pairs
