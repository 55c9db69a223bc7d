"""The files of the page: small, whole, in two languages, and from nowhere else."""

from __future__ import annotations

import hashlib
import json
import re

from shoal.page.server import STATIC

WORDS = json.loads((STATIC / "words.json").read_text("utf-8"))
PUBLISHED = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
}
"""sha256 of dist/ in uplot-1.6.32.tgz of the npm registry."""
SOURCES = {path.name: path.read_text("utf-8") for path in STATIC.iterdir() if path.is_file()}


def test_all_together_are_less_than_100_kb() -> None:
    sizes = {path: path.stat().st_size for path in STATIC.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 100_000, sizes


def test_what_others_wrote_is_what_they_published() -> None:
    """uPlot 1.6.32 as npm has it; its licence beside, which no browser asks for."""
    folder = STATIC / "vendor"
    assert {path.name for path in folder.iterdir()} == set(PUBLISHED)
    for name, wanted in PUBLISHED.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == wanted, name
    assert "The MIT License" in (STATIC.parent / "uPlot-LICENSE.txt").read_text()


def test_every_word_is_in_both_languages() -> None:
    for key, (english, chinese) in WORDS.items():
        assert english and chinese, key
        named = [sorted(re.findall(r"\{\w+\}", text)) for text in (english, chinese)]
        assert named[0] == named[1], key
        # the switch is named in the language that it leads to
        translated = english if key == "language" else chinese
        assert re.search("[\u4e00-\u9fff]", translated), f"{key} is not translated"


def test_every_word_that_is_used_is_in_the_table_and_none_is_left_over() -> None:
    code = "\n".join(text for name, text in SOURCES.items() if name.endswith((".js", ".html")))
    asked = set(re.findall(r'data-word="(\w+)"', code)) | set(re.findall(r'word\("(\w+)"', code))
    assert asked <= set(WORDS)
    mentioned = set(re.findall(r'["\'](\w+)["\']', code))
    assert set(WORDS) <= mentioned | asked, set(WORDS) - mentioned - asked


def test_a_page_brings_nothing_from_elsewhere_and_no_code_in_its_text() -> None:
    page = SOURCES["index.html"]
    assert not re.search(r"https?://|\son\w+=|style=|<script>[^<]", page)
    for name, text in SOURCES.items():
        if name.endswith(".js"):
            assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)
