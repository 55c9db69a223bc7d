"""Finds bursts of negative messages on a topic: what is expected at this hour, CUSUM, and a scan.

Of each topic the expected share p of negative messages is learned by hour of day (Rates). Under a
burst the odds of a negative message are `factor` times as high. CUSUM (Page 1954) adds the log of
the likelihood ratio of each message, never falling below 0:

    s = max(0, s + negative * log(factor) - log(1 - p + factor * p))

Above a threshold, and if among the last messages there are clearly more negative ones than expected
(the scan), it is a burst. Messages that raised s are not learned from before s is 0 again, so that
no burst becomes what is expected. In a burst the same sum runs the other way, and its end is told
once. Copies of a text count once. Nothing is asked of the number of messages, so many messages that
are not negative are no burst.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

HOUR, DAY = 3600.0, 86400.0
PER = 100_000
"""Messages that false alarms are counted in."""

_FORGOTTEN = re.compile(r"https?://\S+|@\w+|\brt\b|[\W_]+")
_STEPS = 40  # of the chain in one log(factor)
_REACH = 4.5  # hours that are near in time
_FRESH = 300.0  # seconds for which what is expected is not computed anew


@dataclass(frozen=True)
class Settings:
    """When a burst is one. Times are seconds of the messages' own clock."""

    factor: float = 2.2
    """Odds of a negative message in a burst, over those expected."""
    false_alarms: float = 8.0
    """Of all topics together, in 100,000 messages, if the expected shares were known exactly and
    nothing had to confirm; what the scan leaves of them is in docs/evidence/apps.md."""
    scan: int = 150
    """Messages that the scan looks at: as many as a burst may take to be found. All that it showed
    till then counts, so a weak one, at an hour in which the share is high anyway, is confirmed."""
    caution: float = 0.5
    """Standard errors that what is expected is taken higher: it was learned from few messages."""
    rhythm: float = 0.35
    """Share by which an hour may be above all others before whole days were seen; 0 from
    `rhythm_days` on."""
    rhythm_days: float = 3.5
    scan_sigmas: float = 3.5
    """Standard deviations above what is expected that the scan asks for; under 1 a burst ends."""
    learning: int = 200
    """Messages of a topic before which there is no alarm."""
    memory_days: float = 7.0
    """After which a message counts 1/e in what is expected."""
    copies_seconds: float = DAY
    """For how long a text is known."""
    silent_seconds: float = 6 * HOUR
    """Without any message a burst ends after so long."""
    longest_seconds: float = DAY
    """What lasts longer is no burst: the level is learned anew."""


@dataclass(frozen=True)
class Change:
    """A burst that began or ended: what is told to people."""

    topic: str
    began: bool
    at: float
    since: float
    """The time of the first message of the burst, as far as can be told."""
    messages: int
    negative: int
    expected: float
    """Of `messages`, how many were expected to be negative."""
    why: str = ""


def run_length(rate: float, *, factor: float, threshold: float) -> float:
    """Messages between two false alarms of CUSUM, on average, where `rate` are negative.

    The sum as a Markov chain on a grid (Brook and Evans, Biometrika 59, 1972).
    """
    step = math.log(factor) / _STEPS
    down = math.log(1 - rate + factor * rate) / step
    size = max(1, math.ceil(threshold / step))
    chain = np.zeros((size, size))
    for state in range(size):
        low, part = divmod(state - down, 1)
        for moved, share in ((low, 1 - part), (low + 1, part)):  # between two points of the grid
            chain[state, max(0, int(moved))] += (1 - rate) * share
            if max(0.0, moved + _STEPS) < size:
                chain[state, max(0, int(moved + _STEPS))] += rate * share
    return float(np.linalg.solve(np.eye(size) - chain, np.ones(size))[0])


def threshold_for(settings: Settings, *, rates: tuple[float, ...] = (0.1, 0.25, 0.4)) -> float:
    """The least threshold whose false alarms are within the budget, at the worst of `rates`.

    Each message moves one topic's sum, so the run length in messages of a topic is that of all
    topics together, however many share the messages.
    """
    wanted, low, high = PER / settings.false_alarms, 1.0, 25.0
    while high - low > 0.02:
        middle = (low + high) / 2
        found = min(run_length(r, factor=settings.factor, threshold=middle) for r in rates)
        low, high = (low, middle) if found >= wanted else (middle, high)
    return high


class Rates:
    """The share of negative messages that is expected at a time of day; recent days count more."""

    def __init__(self, settings: Settings) -> None:
        self._memory = settings.memory_days * DAY
        self._negative, self._seen = [0.0] * 24, [0.0] * 24
        self._touched = [0.0] * 24
        self._settings, self._at, self._expected = settings, -_FRESH, 0.25
        self._first, self.count = math.inf, 0

    def learn(self, at: float, negative: bool) -> None:
        """Count one message."""
        slot = int(at % DAY // HOUR)
        kept = math.exp(-max(0.0, at - self._touched[slot]) / self._memory)
        self._touched[slot] = max(at, self._touched[slot])
        self._negative[slot] = self._negative[slot] * kept + negative
        self._seen[slot] = self._seen[slot] * kept + 1
        self._first = min(self._first, at)
        self.count += 1

    def expected(self, at: float) -> float:
        """The highest share that is plausible: `caution` standard errors above the estimate.

        Hours near in time count by distance; all others a little, as long as little is known.
        """
        if at // _FRESH != self._at // _FRESH or self.count < 1000:
            self._at, self._expected = at, self._computed(at)
        return self._expected

    def _computed(self, at: float) -> float:
        hour = at % DAY / HOUR - 0.5
        negative, seen = 1.0, 4.0  # before anything was seen: a quarter
        for slot in range(math.ceil(hour - _REACH), math.floor(hour + _REACH) + 1):
            weight = 1 - abs(slot - hour) / _REACH
            negative += weight * self._negative[slot % 24]
            seen += weight * self._seen[slot % 24]
        if seen < 100:
            share = 100 / (100 + sum(self._seen))
            negative += share * sum(self._negative)
            seen += share * sum(self._seen)
        days = max(0.0, max(self._touched) - self._first) / DAY
        mean = negative / seen
        mean *= 1 + self._settings.rhythm * max(0.0, 1 - days / self._settings.rhythm_days)
        mean = min(0.95, mean)
        return min(0.95, mean + self._settings.caution * math.sqrt(mean * (1 - mean) / seen))


@dataclass
class Topic:
    """One topic's sums. `see` is called for each message that is no copy."""

    name: str
    settings: Settings
    threshold: float
    rates: Rates = field(init=False)
    began: Change | None = None
    """The burst that is going on."""
    last: float = 0.0

    def __post_init__(self) -> None:
        self.rates = Rates(self.settings)
        self._log = math.log(self.settings.factor)
        self._sum = 0.0
        self._held: list[tuple[float, bool, float]] = []  # since the sum left 0
        self._recent: deque[tuple[bool, float]] = deque()
        self._scanned = [0.0, 0.0, 0.0]  # negative, expected, variance of the recent ones

    @property
    def suspicion(self) -> float:
        """How much of the threshold is reached, 0 to 1; in a burst how much of its end."""
        return min(1.0, self._sum / self.threshold)

    def see(self, at: float, negative: bool) -> Change | None:
        """Take one message; a Change where a burst began or ended."""
        self.last = max(at, self.last)
        expected = self.rates.expected(at)
        self._scan(negative, expected)
        if self.began and at - self.began.at > self.settings.longest_seconds:
            return self._renew(at)
        gain = negative * self._log - math.log1p((self.settings.factor - 1) * expected)
        self._sum = max(0.0, self._sum + (-gain if self.began else gain))
        self._held.append((at, negative, expected))
        if self._sum == 0.0:
            if not self.began:
                self._learn_held()
            self._held.clear()
        elif self._sum > self.threshold and self._confirmed():
            return self._turn(at)
        return None

    def silent(self, now: float) -> Change | None:
        """A burst ends where nobody writes any more."""
        if self.began and now - self.last > self.settings.silent_seconds:
            return self._turn(now, why="nobody writes on it any more")
        return None

    def _scan(self, negative: bool, expected: float) -> None:
        self._recent.append((negative, expected))
        for sign, (was, rate) in ((1, self._recent[-1]), (-1, self._recent[0])):
            if sign > 0 or len(self._recent) > self.settings.scan:
                for at, value in enumerate((was, rate, rate * (1 - rate))):
                    self._scanned[at] += sign * value
        if len(self._recent) > self.settings.scan:
            self._recent.popleft()

    @property
    def _sigmas(self) -> float:
        negative, expected, variance = self._scanned
        return (negative - expected) / math.sqrt(max(variance, 1e-9))

    def _confirmed(self) -> bool:
        if self.began:
            return self._sigmas < 1.0
        if self.rates.count < self.settings.learning:
            self._learn_held()  # nothing is expected yet: what comes is the level
            self._held.clear()
            self._sum = 0.0
            return False
        return self._sigmas >= self.settings.scan_sigmas

    def _turn(self, at: float, *, why: str = "") -> Change:
        seen = self._held
        change = Change(
            topic=self.name,
            began=not self.began,
            at=at,
            since=self.began.since if self.began else seen[0][0],
            messages=len(seen),
            negative=sum(negative for _, negative, _ in seen),
            expected=sum(expected for _, _, expected in seen),
            why=why,
        )
        if self.began:
            self._learn_held()  # since its end was in sight
            self.began = None
        else:
            self.began = change
        self._held.clear()
        self._sum = 0.0
        return change

    def _renew(self, at: float) -> Change:
        self.rates = Rates(self.settings)
        return self._turn(at, why="it lasts: this is the level now, and is learned anew")

    def _learn_held(self) -> None:
        for at, negative, _ in self._held:
            self.rates.learn(at, negative)


class Detector:
    """All topics, made as they come, under one budget of false alarms."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.threshold = threshold_for(self.settings)
        self.topics: dict[str, Topic] = {}
        self._known: OrderedDict[bytes, float] = OrderedDict()

    def see(self, topic: str, text: str, *, negative: bool, at: float) -> Change | None:
        """Take a message of one topic; a copy of a text changes nothing."""
        return None if self.is_copy(topic, text, at=at) else self.topic(topic).see(at, negative)

    def topic(self, name: str) -> Topic:
        """The topic of a name, new or known."""
        if name not in self.topics:
            self.topics[name] = Topic(name, self.settings, self.threshold)
        return self.topics[name]

    def is_copy(self, topic: str, text: str, *, at: float) -> bool:
        """Whether the text, but for case, links, handles and punctuation, was there lately."""
        key = fingerprint(topic, text)
        known = at - self._known.get(key, -math.inf) < self.settings.copies_seconds
        if not known:
            self._known[key] = at
            self._known.move_to_end(key)
            oldest = next(iter(self._known.values()))
            while at - oldest > self.settings.copies_seconds:
                self._known.popitem(last=False)
                oldest = next(iter(self._known.values()))
        return known

    def silent(self, now: float) -> Iterator[Change]:
        """Bursts that end because nobody writes any more."""
        for each in self.topics.values():
            change = each.silent(now)
            if change:
                yield change


def fingerprint(topic: str, text: str) -> bytes:
    """A hash of a text that its copies share."""
    plain = _FORGOTTEN.sub(" ", text.casefold()).strip()
    return hashlib.blake2b(f"{topic}\n{plain}".encode(), digest_size=12).digest()
