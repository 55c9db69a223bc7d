"""Recommendation without a model: neighbours, content, expiry, events, reasons."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from apps.command import Missing, application
from apps.recommend.__main__ import routes
from apps.recommend.catalogue import Catalogue, Item
from apps.recommend.shop import Shop
from apps.recommend.taste import Neighbours
from apps_recommend import Truth
from shoal import UserError

GENRES = ("War", "Comedy", "Horror")


@pytest.fixture
def catalogue(tmp_path: Path) -> Iterator[Catalogue]:
    """30 items of three genres; 40 users who stay in one genre but for a sixth."""
    draw = random.Random(0)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(40):
        taken = draw.sample(range(10), 7)
        for at, item in enumerate(taken):
            genre = user % 3 if draw.random() < 5 / 6 else draw.randrange(3)
            lines.append(f"u{user}\ti{genre * 10 + item}\t{at}")
    (tmp_path / "some.inter").write_text("\n".join(lines) + "\n")
    (tmp_path / "some.item").write_text(
        "item_id:token\tmovie_title:token_seq\tclass:token_seq\n"
        + "".join(f"i{n}\tFilm number {n}\t{GENRES[n // 10]}\n" for n in range(30))
    )
    made = Catalogue(tmp_path / "some.sqlite3")
    made.read(tmp_path / "some.inter")
    yield made
    made.close()


@pytest.fixture
def shop(catalogue: Catalogue) -> Shop:
    return Shop(catalogue)


def shown(shop: Shop, user: str, **asked: float) -> list[str]:
    return [each["id"] for each in shop.recommend(user, count=10, **asked)["items"]]  # type: ignore[arg-type]


def test_what_was_taken_is_not_shown_and_taste_is(shop: Shop, catalogue: Catalogue) -> None:
    for user in ("u0", "u1", "u2"):
        found = shown(shop, user)
        assert len(found) == 10 and not set(found) & set(catalogue.history(user))
        own = int(user[1:]) * 10
        assert int(found[0][1:]) in range(own, own + 10)


def test_an_event_changes_the_next_answer(shop: Shop) -> None:
    before = shown(shop, "u0")
    shop.take("u0", before[0])
    after = shown(shop, "u0")
    assert before[0] not in after and before != after


def test_a_new_user_gets_what_most_took_and_then_his_own(shop: Shop) -> None:
    first = shop.recommend("new")
    assert not first["known"] and {each["reason"]["kind"] for each in first["items"]} == {"taken"}
    counts = [each["reason"]["count"] for each in first["items"]]
    assert counts == sorted(counts, reverse=True)
    for item in ("i20", "i21", "i22"):
        shop.take("new", item)
    assert shop.recommend("new")["known"] and int(shown(shop, "new")[0][1:]) >= 20


def test_every_reason_is_true(shop: Shop, catalogue: Catalogue) -> None:
    kinds = set()
    shop.put("cold", title="Film nobody saw", genres=["War"], expires=None)
    truth = Truth(catalogue)
    for user in ("u0", "u1", "u2", "u3", "nobody"):
        for each in shop.recommend(user, count=24)["items"]:
            kinds.add(each["reason"]["kind"])
            assert truth.holds(each["reason"], user=user, item=each["id"]), each
    assert kinds == {"near", "genre", "taken"}


@pytest.mark.parametrize(
    "reason",
    [
        {"kind": "taken", "count": 10_000},
        {"kind": "near", "item": "i29", "title": ""},
        {"kind": "genre", "genre": "Opera", "item": "i0", "title": ""},
    ],
)
def test_a_reason_that_is_not_true_is_found(
    catalogue: Catalogue, reason: dict[str, object]
) -> None:
    catalogue.take("liar", "i0")
    assert not Truth(catalogue).holds(reason, user="liar", item="i1")


def test_a_new_item_is_found_by_its_content(shop: Shop) -> None:
    shop.put("fresh", title="Film number 31", genres=["Horror"], expires=None)
    places = {user: shown(shop, user, diversity=0.0) for user in ("u2", "u0")}
    assert "fresh" in places["u2"] and "fresh" not in places["u0"]


def test_what_has_expired_is_not_shown(shop: Shop) -> None:
    first = shown(shop, "u0")[0]
    shop.put(first, title="Film", genres=["War"], expires=time.time() - 1)
    assert first not in shown(shop, "u0")
    shop.put(first, title="Film", genres=["War"], expires=time.time() + 60)
    assert first in shown(shop, "u0")


def test_diversity_is_more_genres(shop: Shop) -> None:
    def genres(diversity: float) -> int:
        found = shop.recommend("u0", count=5, diversity=diversity)["items"]
        return len({each["genres"][0] for each in found})

    assert genres(0.0) <= genres(0.5) <= genres(1.0) == 3


@pytest.mark.parametrize(
    ("count", "diversity"), [(0, 0.0), (101, 0.0), (10, -0.1), (10, 1.1), (10, float("nan"))]
)
def test_questions_that_are_refused(shop: Shop, count: int, diversity: float) -> None:
    with pytest.raises(UserError, match="a count of 1 to 100 and a diversity of 0 to 1"):
        shop.recommend("u0", count=count, diversity=diversity)


def test_unknown_users_and_items(shop: Shop) -> None:
    with pytest.raises(Missing, match=r"no item 'i99'; PUT /items/i99"):
        shop.take("u0", "i99")
    with pytest.raises(UserError, match="a name of 1 to 100"):
        shop.take(" ", "i1")
    with pytest.raises(Missing, match="nobody is known as 'x'"):
        shop.user("x")
    with pytest.raises(UserError, match="expected a title"):
        shop.put("x", title=" ", genres=[], expires=None)
    assert len(shop.user("u0")["taken"]) == 7


def test_broken_tables(tmp_path: Path, catalogue: Catalogue) -> None:
    (tmp_path / "bad.inter").write_text("user_id\titem_id\ttimestamp\nu\ti\tlate\n")
    with pytest.raises(UserError, match=r"timestamp, a number"):
        catalogue.read(tmp_path / "bad.inter")
    with pytest.raises(UserError, match="cannot be read"):
        catalogue.read(tmp_path / "none.inter")


def test_nothing_at_all(tmp_path: Path) -> None:
    empty = Catalogue(tmp_path / "empty.sqlite3")
    assert Shop(empty).recommend("u")["items"] == []
    empty.close()


def test_neighbours_are_those_of_the_task() -> None:
    """Events one by one, and all at once, give the similarity that the recipe's scores have."""
    from shoal.tasks.neighbours import History
    from shoal.tasks.neighbours import Neighbours as Theirs

    draw = np.random.default_rng(0)
    histories = [draw.permutation(12)[:9] for _ in range(15)]
    ours = Neighbours([each.tolist() for each in histories], num_items=12)
    slow = Neighbours([], num_items=12)
    for history in histories:
        for at, item in enumerate(history):
            slow.add(history[:at].tolist(), int(item))
    np.testing.assert_allclose(ours.near, slow.near, rtol=1e-5)
    theirs = Theirs([History(np.append(each, [0, 0])) for each in histories], num_items=12)
    norms = np.sqrt(np.outer(ours.counts, ours.counts)) + 10
    np.testing.assert_allclose(ours.near / norms, theirs.similarity, rtol=1e-5)


def test_items_are_one_type() -> None:
    assert Item("a", "A").genres == ()


def test_what_no_route_foresees_is_refused(shop: Shop) -> None:
    client = TestClient(application(routes(shop)), raise_server_exceptions=False)
    found = client.post("/events", content=b'{"user": "\\ud800", "item": "i1"}')
    assert found.status_code == 400 and "surrogate" in found.json()["error"]
    assert client.post("/events", content=b'{"user": "\\ud83d\\ude00", "item": "i1"}').is_success
    for genres in ([1], [{"a": 1}], [None]):
        found = client.put("/items/x", json={"title": "T", "genres": genres})
        assert found.status_code == 400 and "genres as texts" in found.json()["error"]
    found = client.put("/items/x", content=b'{"title": "T", "expires": NaN}')
    assert found.status_code == 400, found.text
