"""Readers of the help of LibreOffice, as its Debian packages have it: a folder for each language.

A language's pages have the names and, but for a few, the paragraphs of every other's.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path

from shoal.data.columns import Record
from shoal.data.files import Report
from shoal.errors import DataError

_SKIPPED = re.compile(r"(?s)<(script|style|head|nav|footer|pre)[^>]*>.*?</\1>")
_PARAGRAPH = re.compile(r"(?s)<(p|h[1-6])\b[^>]*>(.*?)</\1>")
_TAG = re.compile(r"<[^>]+>")
_START = 'id="DisplayArea"'
_LEAST_WORDS = 4
_REPORT_EVERY = 50


def paragraphs(page: Path) -> list[tuple[str, str]]:
    """Tag (p, h1, ...) and plain text of each paragraph of a page, empty ones too."""
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{page}: cannot be read ({error}); fetch it again") from error
    text = _SKIPPED.sub("", text)
    text = text[max(text.find(_START), 0) :]
    return [
        (tag, " ".join(html.unescape(_TAG.sub("", inside)).split()))
        for tag, inside in _PARAGRAPH.findall(text)
    ]


def pages(language: Path, *, at: Report = lambda done: None) -> Iterator[tuple[str, Path]]:
    """Pages of a language by the name they have in all: `text/swriter/main0102.html`."""
    found = sorted(language.glob("text/**/*.html"))
    for number, page in enumerate(found):
        if number % _REPORT_EVERY == 0:
            at(number / len(found))
        yield page.relative_to(language).as_posix(), page
    at(1.0)


def read_help_pages(
    path: Path, *, text_field: str | None = None, at: Report = lambda done: None
) -> Iterator[Record]:
    """`{"text": paragraphs, a line each, "title": the first, "page": name}` of a language."""
    for name, page in pages(path, at=at):
        texts = [text for _, text in paragraphs(page) if text]
        if texts:
            yield {"text": "\n".join(texts), "title": texts[0], "page": name}


def read_translated_help(
    path: Path, *, text_field: str | None = None, at: Report = lambda done: None
) -> Iterator[Record]:
    """`{"source": English, "target": the language of `path`, "kept_together": its page}`.

    Paragraphs of at least four English words, by their order in pages that have the same tags in
    both languages; those that nobody translated are left out, and pairs that were there before.
    Sentences of a page are much alike, so a page is held out as a whole.
    """
    seen = set()
    for name, page in pages(path, at=at):
        english = path.parent / "en-US" / name
        ours, theirs = (paragraphs(each) if each.is_file() else [] for each in (english, page))
        if [tag for tag, _ in ours] != [tag for tag, _ in theirs]:
            continue
        together = "\n".join(text for _, text in ours)
        for (_, source), (_, target) in zip(ours, theirs):
            pair = source, target
            enough = len(source.split()) >= _LEAST_WORDS and target and source != target
            if enough and pair not in seen:
                seen.add(pair)
                yield {"source": source, "target": target, "kept_together": together}
