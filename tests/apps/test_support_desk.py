"""The desk of customer service without a model: articles, passages, threshold, hand-offs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from apps.command import Conflict, Missing, application
from apps.support.__main__ import routes
from apps.support.articles import Article, read_articles, read_questions
from apps.support.desk import MOST_CHARACTERS, Desk, stands_in
from apps.support.search import Index, Threshold, taken_out
from apps.support.store import Store
from eventually import eventually
from shoal import UserError

ARTICLES = [
    Article(
        "borders",
        "Borders of cells",
        "Borders of cells\nSelect the cells.\nChoose a border "
        "line in Format - Cells - Borders, and confirm with OK, which draws it around each.",
    ),
    Article(
        "print",
        "Printing",
        "Printing\nYou can print 3 copies of a page from the File menu, if a printer is there.",
        "https://help.example/print",
    ),
    Article(
        "slides",
        "删除幻灯片",
        "删除幻灯片\n在左侧窗格中选择幻灯片，然后按 Delete 键即可删除该幻灯片，其余保持不变。",
    ),
]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "support.sqlite3")
    yield made
    made.close()


@pytest.fixture
def desk(store: Store) -> Iterator[Desk]:
    store.put(ARTICLES)
    made = Desk(store, join_seconds=0.15)
    yield made
    made.close()


def answers(store: Store, conversation: str) -> list[dict[str, Any]]:
    return [json.loads(e["text"]) for e in store.lines(conversation) if e["who"] == "service"]


@pytest.mark.parametrize(
    ("question", "name", "quoted"),
    [
        ("how do I draw a border line", "borders", "Choose a border"),
        ("print copies", "print", "You can print 3 copies"),
        ("怎样删除幻灯片", "slides", "按 Delete 键"),
    ],
)
def test_a_passage_of_the_right_article_is_quoted(
    desk: Desk, question: str, name: str, quoted: str
) -> None:
    found = desk.answer(question)
    assert found.known and found.id == name and quoted in found.passage
    article = next(each for each in ARTICLES if each.id == name)
    assert all(line in article.text.splitlines() for line in found.passage.splitlines())


def test_words_that_stand_nowhere_are_not_known(desk: Desk) -> None:
    assert not desk.answer("zebra quagga").known


@pytest.mark.parametrize(
    ("question", "said"),
    [(" \n", "empty"), ("x" * 100_000, f"at most {MOST_CHARACTERS:,} characters, this one has")],
)
def test_questions_that_are_none(desk: Desk, question: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        desk.answer(question)


def test_a_single_article(store: Store) -> None:
    store.put(ARTICLES[:1])
    single = Desk(store)
    assert single.answer("border line").known and not single.answer("zebra").known
    single.close()


def test_no_article_at_all(store: Store) -> None:
    empty = Desk(store)
    assert not empty.answer("anything").known
    empty.close()


def test_an_article_can_be_found_when_put_returns(desk: Desk) -> None:
    assert (
        desk.put("new/zebra", title="Zebras", text="Zebras are striped.", link="")["articles"] == 4
    )
    assert desk.answer("zebras").passage == "Zebras are striped."
    assert desk.remove("new/zebra")["articles"] == 3
    assert not desk.answer("zebras").known
    with pytest.raises(Missing, match="no article 'new/zebra'"):
        desk.remove("new/zebra")


@pytest.mark.parametrize(
    ("name", "title", "text", "link", "said"),
    [
        ("a", "A", "  \n", "", "got an empty one; nothing changed"),
        ("a", " ", "text", "", "got an empty one; nothing changed"),
        ("../a", "A", "text", "", "is called by letters"),
        ("a/../b", "A", "text", "", "is called by letters"),
        ("a", "A", "text", "javascript:alert(1)", "begins with https"),
    ],
)
def test_articles_that_are_refused(
    desk: Desk, name: str, title: str, text: str, link: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        desk.put(name, title=title, text=text, link=link)
    assert len(desk.index.articles) == 3


def test_threshold_of_a_curve_made_by_hand() -> None:
    """Ten questions: seven sure ones that are right, then a wrong one, a right one, a wrong one."""
    right = np.array([True] * 7 + [False, True, False])
    possible = np.array([True] * 9 + [False])
    sure = np.arange(10.0, 0.0, -1.0)
    found = Threshold.of({"margin": sure}, right=right, possible=possible, precision=0.9)
    assert (found.value, found.precision) == (4.0, 1.0)
    assert found.coverage == pytest.approx(7 / 9)
    looser = Threshold.of({"margin": sure}, right=right, possible=possible, precision=0.85)
    assert looser.value == 2.0 and looser.coverage == 1.0
    signs = {"margin": -sure, "title": sure}
    both = Threshold.of(signs, right=right, possible=possible, precision=0.9)
    assert both.sign == "title" and "from a title of 4.00 on: 100 % of them" in str(both)
    alike = Threshold.of({"margin": np.ones(10)}, right=right, possible=possible, precision=0.9)
    assert alike.value == float("inf"), "of ten that are as sure, eight are right"
    never = Threshold.of({"margin": sure}, right=np.zeros(10, dtype=bool), possible=possible)
    assert never.value == float("inf") and never.coverage == 0.0


def test_every_fifth_article_is_taken_out() -> None:
    share = taken_out([f"article {n}" for n in range(2000)]).mean()
    assert share == pytest.approx(0.2, abs=0.03)


def test_a_threshold_is_kept_and_answers_obey_it(desk: Desk, store: Store) -> None:
    pairs = [(f"border line {n}", "borders") for n in range(60)]
    with pytest.raises(UserError, match="0 of 1 questions name an article that is here"):
        desk.calibrate([("anything", "not here")])
    found = desk.calibrate([*pairs, *((f"print copies {n}", "print") for n in range(60))])
    assert found.questions == 120 and found.precision >= 0.7
    again = Desk(store)
    assert again.threshold == found
    again.threshold = Threshold(value=99.0)
    unsure = again.answer("border line")
    assert not unsure.known and unsure.others[0]["id"] == "borders" and not unsure.passage
    again.close()


def test_messages_of_one_moment_are_answered_together(desk: Desk, store: Store) -> None:
    for text in ("print", "copies", "please"):
        desk.hear("one", text=text)
    assert not answers(store, "one")
    eventually(lambda: answers(store, "one"))
    time.sleep(0.3)
    (only,) = answers(store, "one")
    assert only["id"] == "print"
    desk.hear("one", text="border line")
    eventually(lambda: len(answers(store, "one")) == 2)
    assert answers(store, "one")[1]["id"] == "borders"
    with pytest.raises(UserError, match="expected a message of 1 to"):
        desk.hear("one", text=" ")


def test_messages_that_are_too_long_together(desk: Desk, store: Store) -> None:
    desk.hear("long", text="x" * 1500)
    desk.hear("long", text="y" * 1500)
    (told,) = eventually(lambda: answers(store, "long"))
    assert "at most 2,000 characters" in told["refused"]


def test_a_person_takes_over_and_what_was_solved_becomes_an_article(
    desk: Desk, store: Store
) -> None:
    with pytest.raises(Missing, match="nothing was asked"):
        desk.hand_off("two")
    desk.hear("two", text="do zebras print")
    eventually(lambda: answers(store, "two"))
    asked = desk.hand_off("two")
    assert asked and asked["state"] == "open" and desk.hand_off("two") == asked
    number = asked["number"]
    with pytest.raises(Conflict, match="is not taken"):
        desk.reply(number, text="early")
    with pytest.raises(Conflict, match="is not taken"):
        desk.solve(number)
    assert desk.take(number, person="Ann")["person"] == "Ann"
    with pytest.raises(Conflict, match="is not open"):
        desk.take(number, person="Bob")
    desk.hear("two", text="print?")
    time.sleep(0.4)
    assert len(answers(store, "two")) == 1, "the machine is silent while a person answers"
    desk.reply(number, text="Zebras do not print.")
    desk.solve(number)
    assert store.handoffs() == []
    (draft,) = store.drafts()
    assert draft["text"] == "Zebras do not print." and draft["title"] == "do zebras print"
    desk.publish(draft["number"], id="zebras", title="Zebras", text=draft["text"])
    assert desk.answer("zebras").passage == "Zebras do not print."
    with pytest.raises(Missing, match="no draft"):
        desk.publish(draft["number"], id="zebras", title="Zebras", text="x")


@pytest.mark.parametrize(
    ("reply", "holds"),
    [
        ("You can print 3 copies.", True),
        ("Select File, then print.", True),
        ("You can print 30 copies.", False),
        ("Ask Microsoft to print.", False),
        ("Use the Edit menu.", False),
        ("", False),
        ("您可以打印 3 份。", False),
    ],
)
def test_a_reply_says_only_what_stands_there(reply: str, holds: bool) -> None:
    assert stands_in(reply, ARTICLES[1].text) is holds


def test_articles_from_files(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text(
        "# Title *one*\n\nSome **bold** [link](http://x).\n\n- a point\n"
    )
    (tmp_path / "b.html").write_text(
        "<html><head><title>Two</title><style>no{}</style></head><body><nav>menu</nav>"
        "<h1>Two</h1><p>First&nbsp;part<br>second</p><ul><li>point</li></ul>"
        "<script>no()</script></body></html>"
    )
    (tmp_path / "empty.md").write_text(" \n")
    (tmp_path / "c.csv").write_text("question,answer\nWhy?,Because.\nHow?,\n")
    found = {each.id: each for each in read_articles(str(tmp_path))}
    assert set(found) == {"a.md", "b.html"}
    assert found["a.md"].text == "Title *one*\nSome bold link.\n- a point"
    assert found["b.html"].title == "Two"
    assert found["b.html"].paragraphs == ["First part", "second", "point"]
    (only,) = read_articles(str(tmp_path / "c.csv"))
    assert (only.title, only.text) == ("Why?", "Because.")


def test_sources_without_articles(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no article with text"):
        list(read_articles(str(tmp_path)))
    (tmp_path / "bad.md").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"bad.md: cannot be read as UTF-8"):
        list(read_articles(str(tmp_path)))
    (tmp_path / "bad.md").unlink()
    (tmp_path / "out.md").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="a link that leads out"):
        list(read_articles(str(tmp_path)))
    with pytest.raises(UserError, match="cannot be read as a table"):
        list(read_articles(str(tmp_path / "none.csv")))
    (tmp_path / "q.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="expected the columns question and id"):
        read_questions(str(tmp_path / "q.csv"))


def test_bm25_is_that_of_the_embedding_task() -> None:
    """bm25s's Lucene form against the scores that the task's words are computed with."""
    from shoal.tasks.embedding_scores import bm25, standard

    texts = [each.words for each in ARTICLES[:2]]
    numbers = {word: n for n, word in enumerate(sorted(set().union(*texts)))}
    asked = ["border", "cells", "print"]
    theirs = bm25(
        [np.array([numbers[word] for word in text]) for text in texts],
        [np.array([numbers[word] for word in asked if word in numbers])],
    )
    ours = Index(ARTICLES[:2], None).scores(" ".join(asked), None)
    np.testing.assert_allclose(ours, standard(theirs)[0], rtol=1e-5)


def test_numbers_that_no_handoff_has(desk: Desk) -> None:
    client = TestClient(application(routes(desk)), raise_server_exceptions=False)
    for number in (7, 10**30):
        found = client.post(f"/handoffs/{number}/solve", json={})
        assert found.status_code in (404, 409), found.text
        assert client.delete(f"/drafts/{number}").status_code == 404
