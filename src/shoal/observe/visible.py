"""Text of models, data and file names, as a terminal may have it."""

from __future__ import annotations

import re

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Controls of a terminal and of the direction of text; all but line feed and tab."""


def visible(text: str) -> str:
    """`text` with control characters spelt out (`\\x1b`), so that a terminal does not obey them.

    They could move the cursor, retitle the window, or hide what follows. Line feeds and tabs stay.
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
