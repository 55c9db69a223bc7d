"""What runs beside one another came to, and the table of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from statistics import mean, stdev
from typing import Any

from shoal.units import format_count

_CLOSE = 1.02
"""Tokens within this factor are as many: where replicas step by themselves, they are reckoned."""


@dataclass
class Outcome:
    """What one run came to. Bytes are those that worker 0 sent, of whatever kind."""

    name: str
    seed: int
    run: str
    loss: float
    """Of the last evaluation."""
    tokens: int
    seconds: float
    """Of all steps; without evaluations and saves."""
    sent_bytes: int
    peak_bytes: int
    """The most that a step sent."""
    staleness: int | None
    """Most steps that a replica's parameters lack of the others'; None: not bounded."""
    curve: list[tuple[int, float, float, int]] = field(default_factory=list)
    """(tokens, seconds, evaluation loss, bytes sent) at each evaluation."""

    @property
    def tokens_per_second(self) -> float:
        """Of all workers together."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def bytes_per_token(self) -> float:
        """Sent by worker 0 for each token of the run."""
        return self.sent_bytes / max(self.tokens, 1)


@dataclass
class Comparison:
    """All runs; `choices` in the order asked, the first is what the others are held against."""

    choices: list[str]
    outcomes: list[Outcome]
    link: str | None = None

    def of(self, name: str) -> list[Outcome]:
        """The runs of one choice, by seed."""
        return [each for each in self.outcomes if each.name == name]

    def loss_at(self, name: str, *, tokens: int) -> float:
        """Mean over seeds of the last evaluation within so many tokens."""
        return mean(
            [loss for at, _, loss, _ in each.curve if at <= _CLOSE * tokens][-1]
            for each in self.of(name)
        )

    def loss_by(self, name: str, *, seconds: float) -> float:
        """Mean over seeds of the last evaluation within so many seconds of steps."""
        return mean(
            [loss for _, at, loss, _ in each.curve if at <= seconds][-1] for each in self.of(name)
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "choices": self.choices,
            "link": self.link,
            "runs": list(map(asdict, self.outcomes)),
        }

    def __str__(self) -> str:
        return "\n".join(_table(self))


def _table(found: Comparison) -> Iterator[str]:
    first = found.of(found.choices[0])
    tokens = min(each.tokens for each in found.outcomes)
    quickest = min(mean(e.seconds for e in found.of(name)) for name in found.choices)
    width = max(len(name) for name in found.choices)
    yield (
        f"{'':{width}}  {'final loss':>17} {'ratio':>6} {'equal tokens':>12} {'equal time':>10} "
        f"{'tokens/s':>9} {'bytes/token':>11} {'ratio':>7} {'peak step':>9} {'stale':>5} "
        f"{'time':>8}"
    )
    for name in found.choices:
        runs = found.of(name)
        losses = [each.loss for each in runs]
        spread = stdev(losses) if len(losses) > 1 else 0.0
        sent, base = (mean(e.bytes_per_token for e in each) for each in (runs, first))
        ratio = mean(losses) / mean(each.loss for each in first)
        stale = runs[0].staleness
        yield (
            f"{name:{width}}  {mean(losses):>8.4f} +- {spread:<.4f} {ratio:>6.3f} "
            f"{found.loss_at(name, tokens=tokens):>12.4f} "
            f"{found.loss_by(name, seconds=quickest * 1.0001):>10.4f} "
            f"{format_count(mean(e.tokens_per_second for e in runs)):>9} {sent:>11.4g} "
            f"{sent / max(base, 1e-12):>7.2%} {format_count(max(e.peak_bytes for e in runs)):>9} "
            f"{'-' if stale is None else stale:>5} {mean(e.seconds for e in runs):>6.1f} s"
        )
    yield (
        f"ratios are to {found.choices[0]}; bytes are those of worker 0, all operations; "
        f"{len(first)} seed{'s' if len(first) > 1 else ''}, +- the standard deviation over them"
    )
