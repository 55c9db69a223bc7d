"""Articles: from a registry entry, or a folder or file of Markdown, HTML or a table; their words."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import shoal

TITLES = 3
"""Times that a title's words count."""

NAME = re.compile(r"[\w][\w./-]{0,199}")
"""What an article may be called."""

_WORD = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]+|\w+")
_CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_BLOCKS = {"p", "li", "td", "th", "dt", "dd", "div", "section", "pre", "br", "tr", "title"}
_BLOCKS |= {f"h{level}" for level in range(1, 7)}
_UNSEEN = {"script", "style", "head", "nav", "footer", "noscript", "template"}
_MARKS = re.compile(r"\*\*|__|`|^#{1,6}\s+|^>\s?|!?\[([^\]]*)\]\([^)]*\)")


@dataclass(frozen=True)
class Article:
    """A text that may be quoted: paragraphs parted by line ends, without those that are empty."""

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
        """What the encoder reads: as it was trained, the title and the first lines."""
        text = self.text if self.text.startswith(self.title) else f"{self.title}\n{self.text}"
        return text[:400]

    @property
    def words(self) -> list[str]:
        """All words, those of the title thrice."""
        return words_of(self.text) + words_of(self.title) * (TITLES - 1)


def words_of(text: str) -> list[str]:
    """Words in small letters; of Chinese every two neighbours."""
    found: list[str] = []
    for run in _WORD.findall(text.casefold()):
        if _CHINESE.match(run) and len(run) > 1:
            found += [run[at : at + 2] for at in range(len(run) - 1)]
        else:
            found.append(run)
    return found


class _Text(HTMLParser):
    """Paragraphs of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.title, self.lines, self._line, self._unseen = "", [""], "", 0
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        """See HTMLParser."""
        self._unseen += tag in _UNSEEN
        self._in_title |= tag == "title"
        if tag in _BLOCKS:
            self.lines.append("")

    def handle_endtag(self, tag: str) -> None:
        """See HTMLParser."""
        self._unseen -= tag in _UNSEEN and self._unseen > 0
        self._in_title &= tag != "title"
        if tag in _BLOCKS:
            self.lines.append("")

    def handle_data(self, data: str) -> None:
        """See HTMLParser."""
        if self._in_title:
            self.title += data
        elif not self._unseen:
            self.lines[-1] += data


def from_html(text: str, *, name: str) -> Article:
    """The article of a page; its title is the page's, or its first line."""
    parser = _Text()
    parser.feed(text)
    lines = [" ".join(line.split()) for line in parser.lines]
    lines = [line for line in lines if line]
    title = " ".join(parser.title.split()) or (lines[0] if lines else "")
    return Article(name, title[:300], "\n".join(lines))


def from_markdown(text: str, *, name: str) -> Article:
    """The article of a file; its title is the first heading, or the first line."""
    blocks = re.split(r"\n\s*\n|\n(?=[#>*-] )", text)
    lines = [
        " ".join(_MARKS.sub(lambda match: match[1] or "", line.strip()) for line in each.split("\n"))
        for each in blocks
    ]
    lines = [" ".join(line.split()) for line in lines]
    lines = [line for line in lines if line]
    heading = re.search(r"^#{1,6}\s+(.+)$", text, re.MULTILINE)
    title = _MARKS.sub("", heading[1]).strip() if heading else (lines[0] if lines else "")
    return Article(name, title[:300], "\n".join(lines))


def read_articles(source: str) -> Iterator[Article]:
    """Articles of a folder (.md, .html, .txt below it), a file, or a name of `shoal data list`.

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
    home = folder.resolve()
    for path in sorted(folder.rglob("*")):
        kind = path.suffix.lower()
        if kind not in (".md", ".markdown", ".txt", ".html", ".htm") or not path.is_file():
            continue
        if not path.resolve().is_relative_to(home):
            raise shoal.UserError(f"{path}: a link that leads out of {folder}; name that folder")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise shoal.UserError(f"{path}: cannot be read as UTF-8 ({error})") from None
        name = path.relative_to(folder).as_posix()
        read = from_html if kind in (".html", ".htm") else from_markdown
        yield read(text, name=name)


def _of_records(source: str) -> Iterator[Article]:
    seen: dict[str, None] = {}
    for number, record in enumerate(_records(source), 1):
        text = str(record.get("answer") or record.get("text") or "")
        title = str(record.get("title") or record.get("question") or text[:80])
        name = str(record.get("id") or record.get("page") or number)
        if name not in seen:
            seen[name] = None
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
    pairs = []
    for record in _records(source):
        question = record.get("query") or record.get("question")
        answered_by = record.get("id") or record.get("page")
        if question and answered_by:
            pairs.append((str(question), str(answered_by)))
    if not pairs:
        raise shoal.UserError(f"{source}: expected the columns question and id, got no such row")
    return pairs
