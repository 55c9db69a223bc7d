"""Rewards that come with shoal, for completions of prompts (`task.reward`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def exact_answer(completion: str, record: Mapping[str, Any]) -> float:
    """1 for the text of the record's `answer` and nothing else but spaces, else 0."""
    return float(completion.strip() == str(record["answer"]).strip())


def answer_digits(completion: str, record: Mapping[str, Any]) -> float:
    """The share of characters that are those of `answer` at the same place; 1 for all of them.

    Of an answer of another length, of the longer one. A number that is nearly right is worth more
    than none, which is a way into what is hard.
    """
    said, wanted = completion.strip(), str(record["answer"]).strip()
    same = sum(one == other for one, other in zip(said, wanted))
    return same / max(len(said), len(wanted), 1)
