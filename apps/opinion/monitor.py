"""From messages to alerts: labels by the served model, topics by words, bursts, what is told."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from apps.command import Missing
from apps.opinion.bursts import DAY, HOUR, Change, Detector
from apps.opinion.sources import Message, Source
from apps.served import NotServed
from apps.state import Row, State
from apps.telling import TABLE, Teller
from apps.texts import words_of
from shoal import UserError

TABLES = (
    TABLE
    + """
create table if not exists messages (number integer primary key, at real, topic text, text text,
  label text, negative integer, copy integer, link text);
create index if not exists by_topic on messages (topic, at);
create table if not exists alerts (number integer primary key, topic text, at real, since real,
  messages integer, negative integer, expected real, themes text, ended real, why text);
"""
)
OTHER = "other"
_AT_ONCE, _KEPT_DAYS, _THEMES = 16, 30, 8
_MORE = 2.0  # times as often as before that a word of a theme is there


class Labels(Protocol):
    """What names the class of each text (apps/served.py)."""

    def classes(self, texts: Sequence[str]) -> list[tuple[str, list[float]]]:
        """The likeliest label and all probabilities."""
        ...

    def labels(self) -> list[str]:
        """All that there are."""
        ...


class Monitor:
    """Takes messages of all sources, in batches; one thread at a time."""

    def __init__(
        self,
        state: State,
        *,
        labels: Labels,
        teller: Teller,
        topics: Mapping[str, Sequence[str]],
        say: Callable[[str], None],
        negative: str = "negative",
    ) -> None:
        self.state, self._labels, self._teller, self._say = state, labels, teller, say
        self._topics = {name: set(words_of(" ".join(words))) for name, words in topics.items()}
        self._negative = negative
        self.detector = Detector()
        self._lock = threading.Lock()
        self._day = 0
        self._remember()

    def _remember(self) -> None:
        """Go on after a restart: what was expected is in the messages of the last days."""
        since = time.time() - self.detector.settings.memory_days * DAY
        asked = "select * from messages where at > ? and copy = 0 order by number"
        for row in self.state.rows(asked, since):
            self.detector.see(
                row["topic"], row["text"], negative=bool(row["negative"]), at=row["at"]
            )
        for alert in self.state.rows("select * from alerts where ended is null"):
            topic = self.detector.topic(alert["topic"])
            if topic.began is None:
                self._ended(alert["topic"], at=time.time(), why="it was over after a restart")

    def check(self) -> None:
        """Raises UserError where the model has no class of that name."""
        self._labels.classes(["a first text"])
        known = self._labels.labels()
        if known and self._negative not in known:
            raise UserError(
                f"--negative {self._negative}: the model's classes are {', '.join(sorted(known))}"
            )

    def topic_of(self, message: Message) -> str:
        """The one that is given, else the one with most of its words in the text."""
        if message.topic:
            return message.topic
        words = set(words_of(message.text))
        best = max(self._topics, key=lambda name: len(self._topics[name] & words), default=OTHER)
        return best if words & self._topics.get(best, set()) else OTHER

    def take(self, messages: Sequence[Message]) -> None:
        """Label, keep and watch messages in their order. Raises NotServed."""
        found = self._labels.classes([each.text for each in messages])
        with self._lock:
            for message, (label, _) in zip(messages, found):
                self._see(message, label)
            for change in list(self.detector.silent(max(each.at for each in messages))):
                self._ended(change.topic, at=change.at, why=change.why)

    def _see(self, message: Message, label: str) -> None:
        topic, negative = self.topic_of(message), label == self._negative
        copy = self.detector.is_copy(topic, message.text, at=message.at)
        self.state.rows(
            "insert into messages (at, topic, text, label, negative, copy, link) "
            "values (?, ?, ?, ?, ?, ?, ?)",
            *(message.at, topic, message.text, label, negative, copy, message.link),
        )
        change = None if copy else self.detector.topic(topic).see(message.at, negative)
        if change and change.began:
            self._began(change)
        elif change:
            self._ended(topic, at=change.at, why=change.why)
        if int(message.at // DAY) > self._day:
            self._new_day(int(message.at // DAY))

    def _began(self, change: Change) -> None:
        themes = self.themes(change.topic, since=change.since)
        self.state.rows(
            "insert into alerts (topic, at, since, messages, negative, expected, themes, why) "
            "values (?, ?, ?, ?, ?, ?, ?, '')",
            *(change.topic, change.at, change.since, change.messages, change.negative),
            *(change.expected, " ".join(themes)),
        )
        text = (
            f"{change.negative} of the last {change.messages} messages on {change.topic} are "
            f"negative, {change.expected:.0f} were expected, since {_clock(change.since)}.\n"
            f"What they are about: {', '.join(themes) or '-'}"
        )
        title = f"Negative messages on {change.topic}"
        note = {"title": title, "text": text, "topic": change.topic, "began": change.at}
        self._say(f"{title}: {text}")
        self._teller.tell(note)

    def _ended(self, topic: str, *, at: float, why: str) -> None:
        alert = self.state.first(
            "update alerts set ended = ?, why = ? where topic = ? and ended is null returning *",
            *(at, why, topic),
        )
        if alert is None:
            return
        title = f"Back to what is expected on {topic}"
        text = f"Since {_clock(at)}, after {(at - alert['at']) / 60:.0f} minutes. {why}".strip()
        note = {"title": title, "text": text, "topic": topic, "began": alert["at"], "ended": at}
        self._say(f"{title}: {text}")
        self._teller.tell(note)

    def again(self) -> None:
        """Tell Alertmanager what still goes on: it forgets what is not said again."""
        for alert in self.state.rows("select * from alerts where ended is null"):
            title = f"Negative messages on {alert['topic']}"
            note = {"title": title, "text": title, "topic": alert["topic"], "began": alert["at"]}
            self._teller.tell(note, only=lambda address: address.startswith("alertmanager+"))

    def _new_day(self, day: int) -> None:
        if self._day:
            text = self.report(self._day)
            title = f"Report of {_date(self._day)}"
            report = {"title": title, "text": text, "topic": "report"}
            self._teller.tell(report, only=lambda each: not each.startswith("alertmanager+"))
        self._day = day
        self.state.rows("delete from messages where at < ?", (day - _KEPT_DAYS) * DAY)

    def themes(self, topic: str, *, since: float) -> list[str]:
        """Words that negative messages have since then, and those before had not as often."""
        asked = "select text from messages where topic = ? and copy = 0 and at {} ? {} limit 2000"
        now = self.state.rows(asked.format(">=", "and negative"), topic, since)
        before = self.state.rows(asked.format("<", "order by number desc"), topic, since)
        counts, usual = (
            Counter(w for row in rows for w in set(words_of(row["text"])) if len(w) > 1)
            for rows in (now, before)
        )
        all_now, all_before = len(now) + 1, len(before) + 1

        def times(word: str) -> float:
            return (counts[word] / all_now) / ((usual[word] + 0.5) / all_before)

        known = [word for word in counts if counts[word] > 1 and times(word) >= _MORE]
        known.sort(key=lambda word: counts[word] * math.log(times(word)), reverse=True)
        return known[:_THEMES]

    def hours(self, topic: str, *, count: int = 48) -> list[dict[str, float]]:
        """Of the last hours: when, messages without copies, share of negative ones, expected.

        Raises Missing.
        """
        last = self.state.first("select max(at) as at from messages where topic = ?", topic)
        if not last or last["at"] is None:
            raise Missing(f"there is no message on {topic[:80]!r} yet")
        end = last["at"]
        first = (end // HOUR - count + 1) * HOUR
        asked = (
            "select cast(at / 3600 as integer) as hour, count(*) as seen, avg(negative) as share "
            "from messages where topic = ? and at >= ? and copy = 0 group by hour order by hour"
        )
        rates = self.detector.topic(topic).rates
        return [
            {
                "at": row["hour"] * HOUR,
                "seen": row["seen"],
                "share": row["share"],
                "expected": rates.expected((row["hour"] + 0.5) * HOUR),
            }
            for row in self.state.rows(asked, topic, first)
        ]

    def topics(self) -> list[Row]:
        """Of each topic: messages, how much of an alarm's threshold is reached, the burst."""
        found = self.state.rows(
            "select topic, count(*) as seen, sum(copy) as copies from messages group by topic"
        )
        for row in found:
            topic = self.detector.topic(row["topic"])
            row |= {"suspicion": topic.suspicion, "burst": topic.began is not None}
            row["learning"] = topic.rates.count < self.detector.settings.learning
        return found

    def report(self, day: int) -> str:
        """What a day was like, as lines of text; `day` counts from 1970."""
        span = (day * DAY, (day + 1) * DAY)
        lines = [f"Report of {_date(day)} (UTC)"]
        for row in self.state.rows(
            "select topic, count(*) as seen, sum(copy) as copies, avg(negative) as share "
            "from messages where at >= ? and at < ? group by topic order by seen desc",
            *span,
        ):
            words = ", ".join(self.themes(row["topic"], since=span[0]))
            lines.append(
                f"{row['topic']}: {row['seen']:,} messages, {row['copies']:,} of them copies; "
                f"{100 * row['share']:.0f} % negative; {words}"
            )
        for row in self.state.rows("select * from alerts where at >= ? and at < ?", *span):
            ended = _clock(row["ended"]) if row["ended"] else "now"
            lines.append(
                f"burst on {row['topic']}, {_clock(row['at'])} to {ended}: {row['themes']}"
            )
        return "\n".join(lines if len(lines) > 1 else [*lines, "no message"])

    async def watch(self, sources: Mapping[str, Source]) -> None:
        """Take what all sources give until they end; one that fails does not end the others."""
        queue: asyncio.Queue[Message] = asyncio.Queue(maxsize=1000)

        async def pump(name: str, source: Source) -> None:
            try:
                async for message in source.messages():
                    await queue.put(message)
                self._say(f"{name}: at its end")
            except (OSError, UserError) as error:
                self._say(f"{name}: ended: {error}")
            except Exception as error:  # what nobody foresaw ends this source, and is told
                self._say(f"{name}: ended: {type(error).__name__}: {error}")

        pumps = [asyncio.ensure_future(pump(*each)) for each in sources.items()]
        while not (all(each.done() for each in pumps) and queue.empty()):
            try:
                batch = [await asyncio.wait_for(queue.get(), timeout=0.2)]
            except TimeoutError:
                continue
            while len(batch) < _AT_ONCE and not queue.empty():
                batch.append(queue.get_nowait())
            while True:
                try:
                    await asyncio.to_thread(self.take, batch)
                    break
                except NotServed as error:
                    self._say(f"messages wait for the model: {error}")
                    await asyncio.sleep(1.0)


def read_topics(path: Path) -> dict[str, list[str]]:
    """Topics with their words, from YAML: `delays: [late, delayed]`. Raises UserError."""
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--topics {path}: cannot be read ({error})") from None
    if not isinstance(tree, dict) or not all(isinstance(each, list) for each in tree.values()):
        raise UserError(f"--topics {path}: expected lines such as `delays: [late, delayed]`")
    return {str(name): [str(word) for word in words] for name, words in tree.items()}


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _date(day: int) -> str:
    return datetime.fromtimestamp(day * DAY, UTC).strftime("%Y-%m-%d")
