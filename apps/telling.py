"""Tells people: Alertmanager (API v2), a webhook, mail. What could not be delivered is tried again.

A receiver is an address: `alertmanager+http://HOST:PORT`, `http(s)://...` (a webhook that gets the
note as JSON), `smtp://HOST:PORT?from=A&to=B`. Notes wait in the application's SQLite file, so that
none is lost and none is sent twice by a restart.
"""

from __future__ import annotations

import json
import smtplib
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from email.message import EmailMessage
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx

from apps.served import is_address
from apps.state import Row, State
from shoal import ShoalError, UserError

TABLE = """
create table if not exists notes (number integer primary key, receiver text, note text,
  state text, tries integer, due real, error text);
"""
WAITING, SENT, FAILED = "waiting", "sent", "failed"
Note = dict[str, Any]
"""`title` and `text` for people, `topic`; of a burst the times `began` and, at its end, `ended`."""

_SECONDS = 10.0
_TRIES = 12
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 600.0
_AGAIN = 60.0  # Alertmanager forgets what is not said again


class Undeliverable(ShoalError):
    """The receiver refuses this note for good."""


def check_receiver(address: str) -> None:
    """Raises UserError for an address that is none."""
    known = ("smtp", "http", "https", "alertmanager+http", "alertmanager+https")
    if address.startswith("smtp://") and is_address(address):
        asked = parse_qs(urlsplit(address).query)
        both = [*asked.get("from", []), *asked.get("to", [])]
        if not {"from", "to"} <= asked.keys() or any("\n" in e or "\r" in e for e in both):
            raise UserError(f"{address}: expected smtp://HOST:PORT?from=ADDRESS&to=ADDRESS")
    if address.partition("://")[0] not in known or not is_address(address):
        raise UserError(f"{address}: expected an address that begins with {', '.join(known)}://")


def deliver(address: str, note: Note) -> None:
    """Send one note. Raises Undeliverable, or what the transport raises."""
    if address.startswith("smtp://"):
        _mail(address, note)
    elif address.startswith("alertmanager+"):
        url = address.removeprefix("alertmanager+").rstrip("/")
        _post(f"{url}/api/v2/alerts", [_alert(note)])
    else:
        _post(address, note)


def _post(url: str, body: Any) -> None:
    answer = httpx.post(url, json=body, timeout=_SECONDS)
    if 400 <= answer.status_code < 500 and answer.status_code not in (408, 429):
        raise Undeliverable(f"{url} refuses it ({answer.status_code}): {answer.text[:200]}")
    answer.raise_for_status()


def _alert(note: Note) -> dict[str, Any]:
    began = note.get("began", time.time())
    made = {
        "labels": {"alertname": "NegativeBurst", "topic": str(note.get("topic", ""))},
        "annotations": {"summary": note["title"], "description": note["text"]},
        "startsAt": datetime.fromtimestamp(began, UTC).isoformat(),
    }
    ended = note.get("ended")
    if ended is not None:  # Alertmanager refuses an end before the beginning
        made["endsAt"] = datetime.fromtimestamp(max(ended, began), UTC).isoformat()
    return made


def _mail(address: str, note: Note) -> None:
    parts = urlsplit(address)
    asked = parse_qs(parts.query)
    message = EmailMessage()
    message["Subject"] = " ".join(note["title"].split())
    message["From"], message["To"] = asked["from"][0], ", ".join(asked["to"])
    message.set_content(note["text"])
    try:
        with smtplib.SMTP(parts.hostname or "", parts.port or 25, timeout=_SECONDS) as server:
            server.send_message(message)
    except (
        smtplib.SMTPRecipientsRefused,
        smtplib.SMTPSenderRefused,
        smtplib.SMTPDataError,
    ) as error:
        codes = [getattr(error, "smtp_code", 0)]
        codes += [code for code, _ in getattr(error, "recipients", {}).values()]
        if any(500 <= code < 600 for code in codes):
            raise Undeliverable(f"the mail server refuses it: {error}") from None
        raise


class Teller:
    """Sends notes to all receivers in a thread, each until it is delivered or refused."""

    def __init__(
        self, state: State, receivers: Sequence[str], *, say: Callable[[str], None]
    ) -> None:
        """Raises UserError for a receiver that is none."""
        for each in receivers:
            check_receiver(each)
        self._state, self._say = state, say
        self.receivers = list(receivers)
        self._wake, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def tell(self, note: Note, *, only: Callable[[str], bool] = lambda address: True) -> None:
        """Queue a note for all receivers that `only` takes."""
        body = json.dumps(note, ensure_ascii=False)
        rows = [(each, body, WAITING, 0, time.time(), "") for each in self.receivers if only(each)]
        self._state.many(
            "insert into notes (receiver, note, state, tries, due, error) "
            "values (?, ?, ?, ?, ?, ?)",
            rows,
        )
        self._wake.set()

    def failed(self) -> list[Row]:
        """Notes that no longer are tried, the newest first, with the reason."""
        return self._state.rows(
            "select number, receiver, error from notes where state = ? order by number desc "
            "limit 20",
            FAILED,
        )

    def _work(self) -> None:
        while not self._ended:
            self._wake.clear()
            held: set[str] = set()  # in order: no end may come before its beginning
            for row in self._state.rows(
                "select * from notes where state = ? order by number", WAITING
            ):
                if row["receiver"] in held or row["due"] > time.time() or not self._try(row):
                    held.add(row["receiver"])
            self._wake.wait(0.5)

    def _try(self, row: Row) -> bool:
        tries, due, error = row["tries"] + 1, row["due"], ""
        try:
            deliver(row["receiver"], json.loads(row["note"]))
            state = SENT
        except Undeliverable as problem:
            state, error = FAILED, str(problem)
        except (httpx.HTTPError, OSError, smtplib.SMTPException) as problem:
            state = WAITING if tries < _TRIES else FAILED
            error = f"{type(problem).__name__}: {problem}"
            due = time.time() + min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (tries - 1))
        except Exception as problem:  # else the thread would end, and nobody be told any more
            state, error = FAILED, f"{type(problem).__name__}: {problem}"
        if state == FAILED:
            self._say(f"a note could not be delivered to {row['receiver']}: {error}")
        self._state.rows(
            "update notes set state = ?, tries = ?, due = ?, error = ? where number = ?",
            *(state, tries, due, error, row["number"]),
        )
        return state != WAITING

    def close(self) -> None:
        """Stop; what waits is sent after the next start."""
        self._ended = True
        self._wake.set()
        self._thread.join(timeout=2 * _SECONDS)
