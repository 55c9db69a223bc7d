"""Sources made by a rule wherever they are read: nothing is fetched, all machines agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from shoal.data.permutation import key_of

Record = dict[str, Any]

_EPISODES = 10_000
_BELOW = 100
"""Both numbers of a sum are below it."""


@dataclass(frozen=True)
class Made:
    """One rule, and what it makes. `version` counts up when its records change."""

    summary: str
    records: Callable[[], Iterator[Record]]
    version: int = 1


def episodes() -> Iterator[Record]:
    """`{"episode": n}`: numbers that environments are reset with, each another beginning."""
    return ({"episode": number} for number in range(_EPISODES))


def _sums(*, held_out: bool) -> Iterator[tuple[str, str]]:
    """All sums of two numbers, in one tenth or the others by a hash of both."""
    for one, other in product(range(_BELOW), repeat=2):
        if (key_of("sum", one, other) % 10 == 0) == held_out:
            yield f"{one}+{other}=", str(one + other)


def sums() -> Iterator[Record]:
    """`{"text": "7+12=19"}`, then the same with 0019 and +19: what reads them writes all three."""
    for question, answer in _sums(held_out=False):
        for spelling in (answer, answer.zfill(4), f"+{answer}"):
            yield {"text": question + spelling}


def questions(*, held_out: bool = False) -> Iterator[Record]:
    """`{"text": "7+12=", "answer": "19"}`."""
    return ({"text": text, "answer": answer} for text, answer in _sums(held_out=held_out))


MADE = {
    "episodes": Made(f"{_EPISODES:,} beginnings of episodes, for environments to play", episodes),
    "sums": Made(
        "nine tenths of the sums of two numbers below 100, with their results in three spellings",
        sums,
        version=2,
    ),
    "sum-questions": Made("the same sums without their results, which are in `answer`", questions),
    "sum-questions-held-out": Made(
        "the last tenth of the sums, as questions", partial(questions, held_out=True)
    ),
}
