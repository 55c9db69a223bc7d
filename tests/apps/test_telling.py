"""Notes to webhooks, Alertmanager and mail servers: delivered once, tried again, or given up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from receivers import post_office, web

from apps import telling
from apps.served import free_port
from apps.state import State
from apps.telling import TABLE, Teller, check_receiver
from eventually import eventually
from shoal import UserError

NOTE = {"title": "Negative\nmessages", "text": "Those.", "topic": "delays", "began": 1000.0}


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    made = State(tmp_path / "notes.sqlite3", tables=TABLE)
    yield made
    made.close()


def states(state: State) -> list[str]:
    return [row["state"] for row in state.rows("select state from notes order by number")]


def test_all_receivers_get_it_once(state: State) -> None:
    with web() as hook, web() as manager, post_office(free_port()) as post:
        receivers = [hook.url, f"alertmanager+{manager.url}", post.address()]
        teller = Teller(state, receivers, say=print)
        teller.tell(NOTE)
        teller.tell({**NOTE, "ended": 900.0})
        eventually(lambda: states(state) == ["sent"] * 6)
        teller.close()
    assert hook.posted == [NOTE, {**NOTE, "ended": 900.0}]
    (first,), (second,) = manager.posted
    assert first["labels"] == {"alertname": "NegativeBurst", "topic": "delays"}
    assert "endsAt" not in first and second["endsAt"] == second["startsAt"], "never before it began"
    assert "Subject: Negative messages" in post.mails[0] and "Those." in post.mails[0]


def test_a_mail_that_bounces_is_given_up_and_told(state: State) -> None:
    said: list[str] = []
    with post_office(free_port()) as post:
        teller = Teller(state, [post.address("nobody@example.org")], say=said.append)
        teller.tell(NOTE)
        eventually(lambda: states(state) == ["failed"])
        teller.close()
    (failed,) = teller.failed()
    assert "the mail server refuses it" in failed["error"] and "no such mailbox" in failed["error"]
    assert "could not be delivered" in said[0]


def test_a_busy_mail_server_is_asked_again(state: State) -> None:
    with post_office(free_port()) as post:
        teller = Teller(state, [post.address("busy@example.org")], say=print)
        teller.tell(NOTE)
        eventually(lambda: state.rows("select * from notes where tries > 0"))
        teller.close()
        (row,) = state.rows("select * from notes")
        assert row["state"] == "waiting" and row["due"] > time.time() - 1


def test_a_receiver_that_is_down_gets_all_in_order_later(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telling, "_FIRST_WAIT", 0.05)
    with web() as hook:
        hook.status = 503
        teller = Teller(state, [hook.url], say=print)
        teller.tell({**NOTE, "title": "one"})
        teller.tell({**NOTE, "title": "two"})
        eventually(lambda: state.rows("select * from notes where tries > 1"))
        assert hook.posted == []
        teller.close()
        hook.status = 200
        again = Teller(state, [hook.url], say=print)  # as after a restart
        eventually(lambda: len(hook.posted) == 2)
        again.close()
    assert [each["title"] for each in hook.posted] == ["one", "two"]


def test_a_webhook_that_refuses_is_given_up(state: State) -> None:
    with web() as hook:
        hook.status = 404
        teller = Teller(state, [hook.url], say=print)
        teller.tell(NOTE)
        eventually(lambda: states(state) == ["failed"])
        teller.close()
    assert "refuses it (404)" in teller.failed()[0]["error"]


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ftp://host", "begins with smtp"),
        ("someone@example.org", "begins with smtp"),
        ("smtp://host:25?to=me@example.org", "from=ADDRESS"),
        ("https://", "begins with smtp"),
        ("https://[half", "begins with smtp"),
        ("smtp://host:many?from=a@b.org&to=c@d.org", "begins with smtp"),
        ("http://host:99999/hook", "begins with smtp"),
        ("smtp://host?from=a@b.org%0d%0aBcc:x@y.org&to=c@d.org", "from=ADDRESS"),
    ],
)
def test_addresses_that_are_none(state: State, address: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_receiver(address)
    with pytest.raises(UserError, match=said):
        Teller(state, [address], say=print)


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("this is no database, however long it may be" * 100)
    with pytest.raises(UserError, match=r"cannot be used .*give another --state"):
        State(tmp_path / "bad", tables=TABLE)


def test_a_receiver_that_breaks_does_not_silence_the_others(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong at one address, the thread that tells goes on."""

    with web() as hook:
        monkeypatch.setattr(telling, "deliver", partial(deliver_or_break, telling.deliver))
        teller = Teller(state, ["http://broken.example/", hook.url], say=print)
        teller.tell(NOTE)
        eventually(lambda: sorted(states(state)) == ["failed", "sent"])
        teller.close()
    assert "ValueError: not foreseen" in teller.failed()[0]["error"]


def deliver_or_break(
    deliver: Callable[[str, dict[str, Any]], None], address: str, note: dict[str, Any]
) -> None:
    if "broken" in address:
        raise ValueError("not foreseen")
    deliver(address, note)
