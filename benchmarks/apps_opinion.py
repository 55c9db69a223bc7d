"""Bursts of negative messages: how many are found, how soon, and how often there is a false alarm.

    python benchmarks/apps_opinion.py [--streams 200] [--sensitivity 0.83] [--false-share 0.12]

Each stream has five topics with a daily rhythm (each its own phase) of volume and of the negative
share, and labels with a classifier's errors. Days of quiet, in which texts are copied 50 times and
one topic has ten times the messages for an hour; then 400 messages of one topic with a share of
0.55 instead of 0.25, then a day of quiet. Beside it: a z-score of the last 100 messages, which is
what dashboards do. Quiet stretches of all streams together are what false alarms are counted in.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where apps/ is

from apps.opinion.bursts import DAY, HOUR, PER, Change, Detector, Settings

TOPICS = ("prices", "delays", "staff", "luggage", "website")
BASE, BURST, RHYTHM, LENGTH = 0.25, 0.55, 0.30, 400
A_DAY = 2000  # messages of one topic


@dataclass(frozen=True)
class Message:
    """What a detector is given, and whether it belongs to the burst."""

    at: float
    topic: str
    text: str
    negative: bool
    burst: bool = False


@dataclass(frozen=True)
class World:
    """What a stream is made of."""

    quiet_days: float = 4.0
    sensitivity: float = 0.83
    """Of negative messages, the share that the classifier calls so."""
    false_share: float = 0.12
    """Of the others, the share that it calls negative."""

    def stream(self, seed: int) -> Iterator[Message]:
        """Messages in time; the burst is in the fifth day."""
        draw = random.Random(seed)
        phases = {each: draw.random() * math.tau for each in TOPICS}
        sick, many = draw.choice(TOPICS), draw.choice(TOPICS)
        begins = (self.quiet_days + draw.random()) * DAY
        crowd = (1 + draw.random() * 2) * DAY
        copies = sorted(draw.random() * self.quiet_days * DAY for _ in range(3))
        at, left, number = 0.0, LENGTH, 0
        while at < begins + 1.5 * DAY:
            number += 1
            swing = math.sin(at / DAY * math.tau)
            at += draw.expovariate(A_DAY * len(TOPICS) / DAY * (1 + RHYTHM * swing))
            topic = draw.choice(TOPICS)
            if crowd < at < crowd + HOUR and draw.random() < 0.6:
                topic = many
                at -= 0.9 * HOUR / A_DAY
            burst = topic == sick and at >= begins and left > 0
            left -= burst
            share = BASE * (1 + RHYTHM * math.sin(at / DAY * math.tau + phases[topic]))
            is_negative = draw.random() < (BURST if burst else share)
            said = draw.random() < (self.sensitivity if is_negative else self.false_share)
            yield Message(at, topic, f"message {letters(number)}", said, burst)
            if copies and at > copies[0]:
                copies.pop(0)
                for copy in range(50):
                    text = f"@user{copy} The same complaint, again! https://t.co/{copy}"
                    yield Message(at + copy, topic, text, True)


def letters(number: int) -> str:
    """A number as a word, since digits alone would be a poor text."""
    return "".join("abcdefghij"[int(digit)] for digit in str(number))


class ZScore:
    """The last 100 messages of a topic against all before them."""

    def __init__(self, sigmas: float) -> None:
        self._sigmas = sigmas
        self._last: dict[str, deque[bool]] = {}
        self._all: dict[str, list[int]] = {}
        self._up: set[str] = set()

    def see(self, topic: str, text: str, *, negative: bool, at: float) -> bool | None:
        """True where an alarm begins, False where it ends."""
        last, known = (
            self._last.setdefault(topic, deque(maxlen=100)),
            self._all.setdefault(topic, [0, 0]),
        )
        last.append(negative)
        known[0] += negative
        known[1] += 1
        if known[1] < 500:
            return None
        mean = known[0] / known[1]
        z = (sum(last) / 100 - mean) / math.sqrt(mean * (1 - mean) / 100)
        if topic not in self._up and z > self._sigmas:
            self._up.add(topic)
            return True
        if topic in self._up and z < 1:
            self._up.remove(topic)
            return False
        return None


@dataclass
class Score:
    """Counts over streams."""

    delays: list[int]
    streams: int = 0
    quiet: int = 0
    false: int = 0
    once: int = 0
    seconds: float = 0.0
    messages: int = 0

    def words(self) -> str:
        """One row."""
        known = sorted(self.delays)
        soon = sum(each <= 150 for each in known) / self.streams
        median = known[len(known) // 2] if known else math.nan
        return (
            f"found within 150: {soon:.3f}; median delay {median}; false alarms in {PER:,}: "
            f"{self.false * PER / self.quiet:.2f} ({self.false} in {self.quiet:,}); one alert and "
            f"one recovery: {self.once / self.streams:.3f}; "
            f"{1e6 * self.seconds / self.messages:.1f} us a message"
        )


def began(change: object) -> bool | None:
    """Whether a detector's answer begins (True) or ends (False) an alarm."""
    return change.began if isinstance(change, Change) else change  # type: ignore[return-value]


def measure(
    make: Callable[[], Detector | ZScore], *, streams: int, world: World, first: int = 0
) -> Score:
    """All streams, each with a fresh detector."""
    score = Score([])
    for seed in range(first, first + streams):
        detector, seen, sick = make(), 0, ""
        alerts, recoveries, after, delay, is_ours = 0, 0, 0, 0, False
        for message in world.stream(seed):
            start = time.perf_counter()
            change = began(
                detector.see(message.topic, message.text, negative=message.negative, at=message.at)
            )
            score.seconds += time.perf_counter() - start
            score.messages += 1
            sick = message.topic if message.burst else sick
            seen += message.burst
            after += bool(sick) and message.topic == sick and not message.burst
            inside = message.topic == sick and seen > 0 and after < 100
            score.quiet += not message.burst
            if change is True and inside:
                alerts, is_ours = alerts + 1, True
                delay = delay or seen + after
            elif change is True:
                score.false += 1
            elif change is False and message.topic == sick and is_ours:
                recoveries, is_ours = recoveries + 1, False  # a later false alarm has its own
        score.streams += 1
        score.delays += [delay] if delay else []
        score.once += alerts == 1 and recoveries == 1
    return score


def main() -> None:
    """Print a row for each detector."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--sensitivity", type=float, default=World.sensitivity)
    parser.add_argument("--false-share", type=float, default=World.false_share)
    parser.add_argument("--first", type=int, default=0, help="seed of the first stream")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=NUMBER")
    parser.add_argument("--no-baseline", action="store_true")
    given = parser.parse_args()
    world = World(sensitivity=given.sensitivity, false_share=given.false_share)
    changed = dict(each.split("=") for each in given.set)
    settings = Settings(**{name: float(value) for name, value in changed.items()})
    print(f"{settings}, threshold {Detector(settings).threshold:.2f}")
    print(
        "bursts   ",
        measure(
            lambda: Detector(settings), streams=given.streams, world=world, first=given.first
        ).words(),
    )
    if not given.no_baseline:
        for sigmas in (3.0, 5.0):
            found = measure(
                lambda s=sigmas: ZScore(s), streams=given.streams, world=world, first=given.first
            )
            print(f"z-score {sigmas:.0f}", found.words())


if __name__ == "__main__":
    main()
