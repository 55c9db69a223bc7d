"""Sources made by a rule wherever they are read: nothing is fetched, all machines agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]

_EPISODES = 10_000


@dataclass(frozen=True)
class Made:
    """One rule, and what it makes. `version` counts up when its records change."""

    summary: str
    records: Callable[[], Iterator[Record]]
    version: int = 1


def episodes() -> Iterator[Record]:
    """`{"episode": n}`: numbers that environments are reset with, each another beginning."""
    return ({"episode": number} for number in range(_EPISODES))


MADE = {
    "episodes": Made(f"{_EPISODES:,} beginnings of episodes, for environments to play", episodes),
}
