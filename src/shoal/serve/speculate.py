"""Guesses of the next tokens by looking where the last ones stood before (prompt lookup decoding).

A guess is computed beside the sure token and taken if the keyed draw of its position is that very
token, so the answer is the one without guesses.
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST, _LEAST = 4, 2
"""Last tokens that are looked for."""
_BACK = 2048
"""Tokens that are searched."""


def proposals_for(tokens: Sequence[int], *, most: int) -> list[int]:
    """At most `most` tokens that followed the latest place with the same last tokens."""
    if most < 1:
        return []
    recent = list(tokens[-_BACK:])
    for length in range(_LONGEST, _LEAST - 1, -1):
        if len(recent) <= length:
            continue
        last = recent[-length:]
        for start in range(len(recent) - length - 1, -1, -1):
            if recent[start : start + length] == last:
                return recent[start + length : start + length + most]
    return []
