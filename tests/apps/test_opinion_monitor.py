"""The monitor: sources, topics, alerts told once, what survives a restart, the daily report."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from receivers import web
from starlette.testclient import TestClient

from apps.command import application
from apps.opinion.__main__ import AIRLINES, routes
from apps.opinion.bursts import DAY
from apps.opinion.monitor import TABLES, Monitor, read_topics
from apps.opinion.sources import MOST_CHARACTERS, Feed, Message, open_source
from apps.served import NotServed, free_port
from apps.state import State
from apps.telling import Teller
from shoal import UserError

BASE = 1_790_000_000.0


class Given:
    """A source of given messages."""

    def __init__(self, given: Sequence[Message]) -> None:
        self._given = given

    async def messages(self) -> AsyncIterator[Message]:
        for each in self._given:
            yield each


class Words:
    """Labels by a word: what a model would say if it were never wrong."""

    def __init__(self) -> None:
        self.down = False

    def classes(self, texts: Sequence[str]) -> list[tuple[str, list[float]]]:
        if self.down:
            raise NotServed("the model is being swapped")
        return [("negative" if "awful" in text else "neutral", [0.5, 0.5]) for text in texts]

    def labels(self) -> list[str]:
        return ["negative", "neutral"]


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    made = State(tmp_path / "opinion.sqlite3", tables=TABLES)
    yield made
    made.close()


@pytest.fixture
def teller(state: State) -> Iterator[Teller]:
    with web() as hook:
        made = Teller(state, [hook.url], say=print)
        made.hook = hook  # type: ignore[attr-defined]
        yield made
        made.close()


def monitor_of(state: State, teller: Teller, labels: Words | None = None) -> Monitor:
    return Monitor(state, labels=labels or Words(), teller=teller, topics=AIRLINES, say=print)


def messages(count: int, share: float, *, first: int = 0, apart: float = 40.0) -> list[Message]:
    draw = random.Random(first)
    found = []
    for number in range(first, first + count):
        words = "".join("abcdefghij"[int(each)] for each in str(number))
        mood = "awful engine" if draw.random() < share else "fine"
        found.append(Message(f"delayed flight {words} {mood}", BASE + number * apart))
    return found


def told(state: State) -> list[dict[str, Any]]:
    rows = state.rows("select note from notes order by number")
    notes = [json.loads(row["note"]) for row in rows]
    return [each for each in notes if each["topic"] != "report"]


def test_one_burst_is_one_alert_and_one_recovery(state: State, teller: Teller) -> None:
    monitor = monitor_of(state, teller)
    monitor.take(messages(1200, 0.2))
    assert told(state) == []
    monitor.take(messages(300, 0.9, first=1200))
    (alert,) = told(state)
    assert alert["title"] == "Negative messages on delays" and "engine" in alert["text"]
    monitor.take(messages(500, 0.2, first=1500))
    assert [each.get("ended") is not None for each in told(state)] == [False, True]
    (row,) = state.rows("select * from alerts")
    assert row["ended"] > row["at"] >= row["since"] and "engine" in row["themes"]


def test_a_restart_forgets_nothing_and_tells_nothing_twice(state: State, teller: Teller) -> None:
    first = monitor_of(state, teller)
    now = time.time() - 1700 * 40 - BASE
    shifted = [
        Message(m.text, m.at + now) for m in [*messages(1200, 0.2), *messages(200, 0.9, first=1200)]
    ]
    first.take(shifted)
    assert len(told(state)) == 1
    again = monitor_of(state, teller)
    assert again.detector.topic("delays").began is not None
    again.take([Message(m.text, m.at + now) for m in messages(50, 0.9, first=1400)])
    assert len(told(state)) == 1
    again.take([Message(m.text, m.at + now) for m in messages(250, 0.2, first=1450)])
    assert len(told(state)) == 2


def test_topics(state: State, teller: Teller, tmp_path: Path) -> None:
    monitor = monitor_of(state, teller)
    found = [monitor.topic_of(Message(text, 0.0)) for text in ("My bags are lost", "hello")]
    assert found == ["luggage", "other"]
    assert monitor.topic_of(Message("my bags", 0.0, topic="mine")) == "mine"
    (tmp_path / "t.yaml").write_text("价格: [贵, 便宜]\n")
    assert read_topics(tmp_path / "t.yaml") == {"价格": ["贵", "便宜"]}
    (tmp_path / "bad.yaml").write_text("price: high\n")
    with pytest.raises(UserError, match="expected lines such as"):
        read_topics(tmp_path / "bad.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        read_topics(tmp_path / "none.yaml")


def test_a_label_that_the_model_has_not(state: State, teller: Teller) -> None:
    monitor = Monitor(state, labels=Words(), teller=teller, topics={}, say=print, negative="sad")
    with pytest.raises(
        UserError, match="--negative sad: the model's classes are negative, neutral"
    ):
        monitor.check()


def test_the_report_of_a_day(state: State, teller: Teller) -> None:
    monitor = monitor_of(state, teller)
    day = int(BASE // DAY) + 1
    monitor.take([Message(f"lost bag {n} awful", day * DAY + n) for n in range(9)])
    monitor.take([Message("lost bag 1 awful", day * DAY + 20)])
    text = monitor.report(day)
    assert "luggage: 10 messages, 1 of them copies" in text or "luggage: 10 messages" in text
    assert monitor.report(day + 5).endswith("no message")
    monitor.take([Message("hello", (day + 1) * DAY + 5)])
    notes = [json.loads(row["note"]) for row in state.rows("select note from notes")]
    assert [each["title"].startswith("Report of") for each in notes] == [True]


def watched(monitor: Monitor, name: str, *, say: Callable[[str], None] = print) -> None:
    asyncio.run(monitor.watch({name: open_source(name, say=say)}))


def test_a_file_of_messages(state: State, teller: Teller, tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "m.jsonl").write_text(
        'plain text awful\n\n{"text": "with time", "at": 5, "topic": "t", "link": "https://x"}\n'
        '{"text": 5}\n{broken\n{"text": "x", "at": "soon"}\n'
    )
    watched(monitor_of(state, teller), str(tmp_path / "m.jsonl"), say=said.append)
    rows = state.rows("select text, label, topic, at from messages order by number")
    assert [row["text"] for row in rows] == ["plain text awful", "with time"]
    assert rows[0]["label"] == "negative" and (rows[1]["topic"], rows[1]["at"]) == ("t", 5.0)
    assert [line.split(" is left")[0][-6:] for line in said] == ["line 4", "line 5", "line 6"]


def test_messages_wait_while_the_model_is_swapped(
    state: State, teller: Teller, tmp_path: Path
) -> None:
    labels = Words()
    labels.down = True
    monitor = monitor_of(state, teller, labels)
    (tmp_path / "m.txt").write_text("one\ntwo\n")
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        labels.down &= "wait for the model" not in line

    monitor._say = say
    watched(monitor, str(tmp_path / "m.txt"))
    assert len(state.rows("select * from messages")) == 2
    assert any("messages wait for the model" in line for line in said)


FEED = b"""<?xml version="1.0"?><rss version="2.0"><channel><title>t</title>
<item><guid>2</guid><title>Second</title>
<description>&lt;p&gt;awful &lt;b&gt;day&lt;/b&gt;&lt;/p&gt;</description></item>
<item><guid>1</guid><title>First</title><link>https://example.org/1</link></item>
</channel></rss>"""


async def first(said: list[str]) -> None:
    """Until something was said."""
    async with asyncio.timeout(60):
        while not said:
            await asyncio.sleep(0.02)


def test_a_feed_that_is_down_comes_back() -> None:
    said: list[str] = []

    async def some(url: str, count: int) -> list[Message]:
        found = []
        async for message in Feed(url, said.append, every_seconds=0.05).messages():
            found.append(message)
            if len(found) == 1:
                server.body = FEED.replace(
                    b"</channel>", b"<item><guid>3</guid><title>Third</title></item></channel>"
                )
            if len(found) == count:
                return found
        return found

    async def scenario() -> list[Message]:
        task = asyncio.ensure_future(some(server.url, 3))
        await first(said)
        server.status, server.body = 200, FEED
        return await asyncio.wait_for(task, timeout=60)

    with web() as server:
        server.status = 500
        found = asyncio.run(scenario())
    assert [each.text for each in found] == ["First", "Second awful day", "Third"]
    assert found[0].link == "https://example.org/1"
    assert len(said) == 1 and "cannot be read, and is tried again" in said[0]


def test_what_is_no_feed() -> None:
    said: list[str] = []

    async def scenario() -> None:
        async def read() -> None:
            async for _ in Feed(server.url, said.append, every_seconds=0.05).messages():
                pass

        task = asyncio.ensure_future(read())
        await first(said)
        await asyncio.sleep(0.2)  # so that it asks again
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with web() as server:
        server.body = b"<html>hello"
        asyncio.run(scenario())
    assert len(said) == 1 and "it is no feed" in said[0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no-such-file", "no such file"),
        ("redis://localhost", r"expected redis://HOST:PORT/0\?stream"),
        ("redis://localhost:many/0?stream=a", "no address"),
        ("http://[half", "no address"),
        ("https://", "no address"),
        ("http://host:99999/feed", "no address"),
    ],
)
def test_sources_that_are_none(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_source(name, say=print)


def test_messages_by_post(state: State, teller: Teller) -> None:
    monitor = monitor_of(state, teller)
    client = TestClient(application(routes(monitor, teller)))
    sent = {"messages": ["my bag is lost", {"text": "awful " * 5000, "topic": "long"}]}
    assert client.post("/messages", json=sent).json() == {"taken": 2}
    rows = state.rows("select topic, length(text) as size, negative from messages")
    assert [row["topic"] for row in rows] == ["luggage", "long"]
    assert rows[1]["size"] <= MOST_CHARACTERS and rows[1]["negative"] == 1
    for wrong in ({}, {"messages": "x"}, {"messages": [5]}):
        found = client.post("/messages", json=wrong)
        assert found.status_code == 400 and "expected" in found.json()["error"], wrong
    assert client.post("/messages", content=b"{").status_code == 400
    assert {row["topic"] for row in client.get("/topics").json()} == {"luggage", "long"}
    assert client.get("/topics/long/hours").json()[0]["share"] == 1.0
    assert client.get("/alerts").json() == [] and "long: 1 messages" in client.get("/report").text
    for day in ("never", "9" * 30):
        assert client.get(f"/report?day={day}").status_code == 400
    nowhere = client.get("/topics/nowhere/hours")
    assert nowhere.status_code == 404 and "no message on 'nowhere'" in nowhere.json()["error"]
    assert "nowhere" not in monitor.detector.topics


@pytest.mark.parametrize(
    "at",
    [1000 * time.time(), time.time() + 2 * DAY, -1, 1e400, float("nan"), "soon", [1]],
    ids=["milliseconds", "two days on", "negative", "endless", "none", "a word", "a list"],
)
def test_times_that_are_none(state: State, teller: Teller, at: Any) -> None:
    """Milliseconds would be a day in the far future, before which all is forgotten."""
    monitor = monitor_of(state, teller)
    monitor.take(messages(20, 0.2))
    client = TestClient(application(routes(monitor, teller)), raise_server_exceptions=False)
    body = json.dumps({"messages": [{"text": "a flight", "at": at}]})
    found = client.post("/messages", content=body)
    assert found.status_code == 400 and "seconds since 1970" in found.json()["error"]
    assert len(state.rows("select * from messages")) == 20


def test_a_source_that_fails_is_told(state: State, teller: Teller) -> None:
    class Broken:
        async def messages(self) -> AsyncIterator[Message]:
            yield Message("a flight", BASE)
            raise KeyError("whatever it may be")

    said: list[str] = []
    monitor = Monitor(state, labels=Words(), teller=teller, topics={}, say=said.append)
    asyncio.run(monitor.watch({"a feed": Broken(), "another": Given(messages(3, 0.0))}))
    assert "a feed: ended: KeyError: 'whatever it may be'" in said
    assert len(state.rows("select * from messages")) == 4


@pytest.mark.skipif(not shutil.which("redis-server"), reason="needs redis-server")
def test_a_redis_stream_over_restarts_of_both_sides(tmp_path: Path) -> None:
    """What comes while nobody reads is read later, each entry once."""
    import redis

    port, said = free_port(), list[str]()
    start = ["redis-server", "--port", str(port), "--dir", str(tmp_path), "--appendonly", "yes"]

    def started() -> subprocess.Popen[bytes]:
        made = subprocess.Popen(start, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            with (
                contextlib.suppress(redis.exceptions.ConnectionError),
                redis.Redis(port=port) as one,
            ):
                if one.ping():
                    return made
            time.sleep(0.05)
        raise AssertionError("Redis did not start")

    def add(*texts: str) -> None:
        with redis.Redis(port=port) as client:
            for text in texts:
                client.xadd("s", {"text": text})

    async def read(count: int, *, then: Callable[[], object]) -> list[str]:
        stream = open_source(f"redis://127.0.0.1:{port}/0?stream=s", say=said.append).messages()
        found = list[str]()
        asyncio.get_running_loop().call_later(0.5, then)
        while len(found) < count:
            found.append((await asyncio.wait_for(anext(stream), timeout=20)).text)
        await stream.aclose()  # type: ignore[attr-defined]
        return found

    server = started()
    try:
        assert asyncio.run(read(2, then=lambda: add("one", "two"))) == ["one", "two"]
        add("three")
        server.terminate()
        server.wait()

        def again() -> None:
            nonlocal server
            server = started()
            add("four")

        assert asyncio.run(read(2, then=again)) == ["three", "four"]
        assert len(said) == 1 and "cannot be read, and is tried again" in said[0]
    finally:
        server.terminate()
        server.wait()
