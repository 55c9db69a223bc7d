"""Questions of a manual and of an FAQ: what is learned from, what is held out, what is searched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.data.questions import FAQ, FAQ_HELD_OUT, HELP, HELP_HELD_OUT
from shoal.errors import DataError


def page(folder: Path, name: str, title: str, text: str) -> str:
    path = folder / "text" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<html><head><title>x</title></head><body><div id="DisplayArea"><h1>{title}</h1>'
        f"<p>{text}</p></div></body></html>",
        encoding="utf-8",
    )
    return f"en-US/text/{name}"


@pytest.fixture
def manual(tmp_path: Path) -> Path:
    """Forty pages; every one but each tenth has two terms, one of them twice."""
    folder, lines = tmp_path / "en-US", []
    for number in range(40):
        url = page(folder, f"calc/{number}.html", f"Page {number}", f"It explains &amp; {number}.")
        terms = [f"cells -- number {number}", f"number {number} &lt; all"] if number % 10 else []
        for term in [*terms, *terms[:1]]:
            lines.append(f'{{url:"{url}?DbPAR=CALC#bm_id{number}", app:"CALC", text:"{term}"}}')
    index = "var bookmarks = [\n" + ",\n".join(lines) + "\n];"
    (folder / "bookmarks.js").write_text(index, encoding="utf-8")
    return folder


def test_pages_are_held_out_with_all_of_their_terms(manual: Path) -> None:
    learned, held = list(HELP(manual)), list(HELP_HELD_OUT(manual))
    assert all("query" in record for record in learned)
    asked = [record for record in held if "query" in record]
    ours, theirs = ({record["text"] for record in each} for each in (learned, asked))
    assert ours and theirs and not ours & theirs, "by page"
    assert len(ours | theirs) == 36 and len(learned) + len(asked) == 72, "a term once"
    assert len({record["text"] for record in held}) == 40, "all pages are searched"
    plain = [record for record in held if "query" not in record]
    assert len(plain) == 40 - len(theirs) and not {r["text"] for r in plain} & theirs
    one = next(record for record in (*learned, *asked) if record["page"] == "text/calc/1.html")
    assert one["query"] in ("cells number 1", "number 1 < all")
    assert one["text"] == "Page 1\nIt explains & 1."


def test_half_of_an_faq_is_held_out(tmp_path: Path) -> None:
    rows = [{"q": f"why {n}?", "a": f"because {n}", "category": "x"} for n in range(30)]
    path = tmp_path / "faq.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    learned, held = list(FAQ(path)), list(FAQ_HELD_OUT(path))
    asked = [record for record in held if "query" in record]
    assert len(learned) + len(asked) == 30 and 5 < len(asked) < 25
    assert not {r["text"] for r in learned} & {r["text"] for r in asked}
    assert len(held) == 30


def test_a_manual_without_its_index(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"bookmarks\.js: cannot be read"):
        list(HELP(tmp_path))
