"""docs/zh has the pages of docs/start and docs/guide, each built like the English one."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS, CHINESE = ROOT / "docs", ROOT / "docs" / "zh"
GENERATED = {"guide/recipe.md", "guide/models.md", "guide/layouts.md"}
"""Written by scripts from the sources: they are in English only."""

PAGES = sorted(
    path.relative_to(DOCS).as_posix()
    for folder in ("start", "guide")
    for path in (DOCS / folder).glob("*.md")
    if path.relative_to(DOCS).as_posix() not in GENERATED
)
IDEOGRAPHS = re.compile("[一-鿿]")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def parts(page: str) -> tuple[str, str]:
    """A page's English and Chinese text."""
    return (DOCS / page).read_text("utf-8"), (CHINESE / page).read_text("utf-8")


def prose(text: str) -> str:
    return FENCED.sub("", text)


def headings(text: str) -> list[int]:
    return [len(each) for each in re.findall(r"^(#+) ", prose(text), re.MULTILINE)]


def code(text: str) -> list[str]:
    """Fenced blocks; what a line of a shell block says behind its command may be Chinese."""
    blocks = FENCED.findall(text)
    return [re.sub(r" +# .*", "", each) if each[:5] == "```sh" else each for each in blocks]


def tables(text: str) -> list[int]:
    """Cells of each row of each table."""
    rows = re.findall(r"^\|.*\|$", prose(text), re.MULTILINE)
    return [len(re.findall(r"(?<!\\)\|", re.sub("`[^`]*`", "", row))) for row in rows]


def targets(text: str, page: Path) -> list[str]:
    """Where its links lead: for both languages the English page, without its anchor."""
    found = []
    for target in LINK.findall(prose(text)):
        path = target.partition("#")[0]
        if re.match(r"[a-z]+:", target) or not path:
            found.append(target if path else "#")
            continue
        place = Path(os.path.normpath(page.parent / path))
        assert place.exists(), f"{page}: {target} leads nowhere"
        name = place.relative_to(ROOT).as_posix()
        found.append(name.replace("docs/zh/", "docs/").replace("README.zh.md", "README.md"))
    return sorted(found)


def test_every_page_is_there() -> None:
    there = sorted(path.relative_to(CHINESE).as_posix() for path in CHINESE.rglob("*.md"))
    assert there == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_built_like_the_english_one(page: str) -> None:
    english, chinese = parts(page)
    assert headings(chinese) == headings(english)
    assert code(chinese) == code(english)
    assert tables(chinese) == tables(english)
    assert targets(chinese, CHINESE / page) == targets(english, DOCS / page)
    items, theirs = (re.findall(r"^ *([-*]|\d+\.) ", prose(t), re.M) for t in (chinese, english))
    assert items == theirs
    assert f"](../zh/{page})" in english and f"](../../{page})" in chinese


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_in_chinese(page: str) -> None:
    """Every heading but names, every paragraph that has words."""
    english, chinese = parts(page)
    kept = set(prose(english).split("\n"))
    long = [
        line
        for line in prose(chinese).split("\n")
        if line in kept and re.search(r"(?:[a-z]{3,} ){4}", re.sub(r"`[^`]*`|\([^)]*\)", "", line))
    ]
    assert not long and IDEOGRAPHS.search(chinese.split("\n")[0])
