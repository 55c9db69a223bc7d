"""What packages of the registry hold is read once, and names in it as they were marked."""

from __future__ import annotations

from pathlib import Path

from shoal.data.corpora import read_people_daily, read_reviews
from shoal.data.readers import read_tagged_once


def test_reviews_are_read_once_and_without_those_judged_both_ways(tmp_path: Path) -> None:
    (tmp_path / "pos.txt").write_text("很 好\n不错\n很  好\n一般\n\n", encoding="utf-8")
    (tmp_path / "neg.txt").write_text("太差\n一般\n", encoding="utf-8")
    done: list[float] = []
    assert list(read_reviews(tmp_path, at=done.append)) == [
        {"text": "很 好", "label": "positive"},
        {"text": "不错", "label": "positive"},
        {"text": "太差", "label": "negative"},
    ]
    assert done[-1] == 1.0 and done == sorted(done)


def test_names_of_the_peoples_daily(tmp_path: Path) -> None:
    """A surname and the given name are one person; two names of places side by side are two."""
    path = tmp_path / "daily.txt"
    path.write_text(
        "中共中央/nt  总书记/n  江/nr  泽民/nr  在/p  北京/ns  上海/ns  。/w  好/a\n"
        "江/nr  ，/w  长城/nz\n好/a\n",
        encoding="utf-8",
    )
    first, second, third = read_people_daily(path)
    assert "".join(first["words"]) == "中共中央总书记江泽民在北京上海。"
    org, person = ["B-ORG", *["I-ORG"] * 3], ["B-PER", "I-PER", "I-PER"]
    place = ["B-LOC", "I-LOC"]
    assert first["tags"] == [*org, *"OOO", *person, "O", *place, *place, "O"]
    assert second == {"words": ["好"], "tags": ["O"]}, "and the same a line later is left out"
    assert third["tags"] == ["B-PER", "O", "B-MISC", "I-MISC"]


def test_tagged_sentences_once(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text("Ann\tB-PER\n\nso\tO\n\nAnn\tO\n", encoding="utf-8")
    assert list(read_tagged_once(path)) == [
        {"words": ["Ann"], "tags": ["B-PER"]},
        {"words": ["so"], "tags": ["O"]},
    ]
