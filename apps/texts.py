"""Words of texts in any language, and plain paragraphs of HTML and Markdown."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

_WORD = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]+|\w+")
_CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_BLOCKS = {"p", "li", "td", "th", "dt", "dd", "div", "section", "pre", "br", "tr"}
_BLOCKS |= {f"h{level}" for level in range(1, 7)}
_UNSEEN = {"script", "style", "head", "nav", "footer", "noscript", "template", "title"}
_MARKS = re.compile(r"\*\*|__|`|^#{1,6}\s+|^>\s?|!?\[([^\]]*)\]\([^)]*\)")


def words_of(text: str) -> list[str]:
    """Words in small letters; of Chinese every two neighbours."""
    found: list[str] = []
    for run in _WORD.findall(text.casefold()):
        if _CHINESE.match(run) and len(run) > 1:
            found += [run[at : at + 2] for at in range(len(run) - 1)]
        else:
            found.append(run)
    return found


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.title, self.lines, self._unseen, self._tag = "", [""], 0, ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._unseen += tag in _UNSEEN
        self._tag = tag
        self.lines += [""] if tag in _BLOCKS else []

    def handle_endtag(self, tag: str) -> None:
        self._unseen -= tag in _UNSEEN and self._unseen > 0
        self._tag = ""
        self.lines += [""] if tag in _BLOCKS else []

    def handle_data(self, data: str) -> None:
        if self._tag == "title":
            self.title += data
        elif not self._unseen:
            self.lines[-1] += data


def html_lines(text: str) -> tuple[str, list[str]]:
    """The title of a page (its own, or its first line) and its paragraphs."""
    page = _Page()
    page.feed(text)
    lines = _plain(page.lines)
    return " ".join(page.title.split()) or "".join(lines[:1]), lines


def markdown_lines(text: str) -> tuple[str, list[str]]:
    """The title of a text (its first heading, or its first line) and its paragraphs."""
    blocks = re.split(r"\n\s*\n|\n(?=[#>*-] )|(?<=\n)(?=#)", text)
    bare = [
        " ".join(_MARKS.sub(lambda mark: mark[1] or "", line.strip()) for line in each.split("\n"))
        for each in blocks
    ]
    heading = re.search(r"^#{1,6}\s+(.+)$", text, re.MULTILINE)
    lines = _plain(bare)
    return _MARKS.sub("", heading[1]).strip() if heading else "".join(lines[:1]), lines


def _plain(lines: list[str]) -> list[str]:
    joined = (" ".join(line.split()) for line in lines)
    return [line for line in joined if line]
