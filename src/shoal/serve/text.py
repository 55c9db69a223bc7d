"""Tokens to text as they come: no half characters, and no stop string let through.

Byte-level tokens cut characters anywhere, and some decoders drop a blank at the beginning of what
they are given. So a few tokens before the new ones are decoded with and without them, and the
difference is given out once it ends in a whole character.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_BROKEN = "\ufffd"
_BEFORE = 6
"""Tokens of the prompt that the first new one is read after."""
_MOST_OPEN = 3
"""Bytes that the longest character lacks one of."""


class Decoder(Protocol):
    """What of a tokenizer is used (tokenizers.Tokenizer)."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class Detokeniser:
    """The text of an answer, piece by piece."""

    def __init__(self, tokenizer: Decoder, *, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        before = list(prompt[-_BEFORE:])
        while before and self._text(before).endswith(_BROKEN):
            before.pop()  # a prompt that ends inside a character gives none of it to the answer
        self._ids, self._prefix, self._read = before, 0, len(before)
        self._told = ""

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def add(self, token: int) -> str:
        """The text that is certain after one more token."""
        self._ids.append(token)
        known = self._text(self._ids[self._prefix : self._read]) + self._told
        new = self._text(self._ids[self._prefix :])
        if not new.startswith(known):
            return ""  # some decoders take all bytes of an unfinished run for broken ones
        open_ = len(new) - len(new.rstrip(_BROKEN))
        if open_:  # its last bytes may become a character yet; what is before them stays
            piece = new[len(known) : max(len(known), len(new) - min(open_, _MOST_OPEN))]
            self._told += piece
            return piece
        self._prefix, self._read, self._told = self._read, len(self._ids), ""
        return new[len(known) :]

    def end(self) -> str:
        """What is left: bytes that never became a character are given out as U+FFFD."""
        known = self._text(self._ids[self._prefix : self._read]) + self._told
        new = self._text(self._ids[self._prefix :])
        self._prefix = self._read = len(self._ids)
        return new[len(known) :]


class Stops:
    """Holds back what may become a stop string, and ends before one. Counts characters."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [each for each in stops if each]
        self._held = ""
        self.stopped = False

    def add(self, piece: str) -> str:
        """What may be shown now; after a stop string nothing."""
        if self.stopped:
            return ""
        self._held += piece
        found = [at for each in self._stops if (at := self._held.find(each)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max((self._begun(each) for each in self._stops), default=0)
        at = len(self._held) - keep
        shown, self._held = self._held[:at], self._held[at:]
        return shown

    def _begun(self, stop: str) -> int:
        """Characters at the end of what is held that are the beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        sizes = range(longest, 0, -1)
        return next((n for n in sizes if self._held.endswith(stop[:n])), 0)

    def end(self) -> str:
        """What was held back and turned out to be no stop string."""
        shown, self._held = self._held, ""
        return shown
