"""Scores of written texts as sums that add up over a corpus, and the nearest of known texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.tasks.task import Vector

_ORDER, _BETA = 6, 2.0  # of chrF2: character n-grams up to six, recall twice as important
CHRF_SUMS = 3 * _ORDER

_GRAM, _BUCKETS = 3, 1 << 18  # character trigrams, by their hash


def chrf_sums(written: str, reference: str) -> Vector:
    """[n-grams written, of the reference, in both] for n = 1..6, blanks left out: adds up."""
    sums = np.zeros((_ORDER, 3))
    texts = ["".join(text.split()) for text in (written, reference)]
    for order in range(1, _ORDER + 1):
        mine, theirs = (
            Counter(text[at : at + order] for at in range(len(text) - order + 1)) for text in texts
        )
        if theirs:  # a reference too short to have any asks for none
            sums[order - 1] = [mine.total(), theirs.total(), (mine & theirs).total()]
    return sums.ravel()


def chrf(sums: Vector) -> float:
    """chrF2 of a corpus, 0 to 100 (Popovic, 2015), as sacrebleu computes it from `chrf_sums`."""
    found = [(a, b, both) for a, b, both in sums.reshape(_ORDER, 3) if a and b]
    if not found:
        return 0.0
    precision = sum(both / a for a, _, both in found) / len(found)
    recall = sum(both / b for _, b, both in found) / len(found)
    if not precision + recall:
        return 0.0
    factor = _BETA**2
    return float(100 * (1 + factor) * precision * recall / (factor * precision + recall))


def plain_words(text: str) -> list[str]:
    """Words in lower case without punctuation; apostrophes inside a word stay."""
    return re.findall(r"\w+(?:'\w+)*", text.lower().replace("’", "'"))


def word_errors(written: Sequence[str], reference: Sequence[str]) -> int:
    """Words to put in, take out or change that make the one of the other (Levenshtein)."""
    row = list(range(len(reference) + 1))
    for number, word in enumerate(written, start=1):
        before, row[0] = row[0], number
        for place, other in enumerate(reference, start=1):
            change = before + (word != other)
            before = row[place]
            row[place] = min(change, row[place] + 1, row[place - 1] + 1)
    return row[-1]


def text_to_bytes(text: str) -> NDArray[np.uint8]:
    """UTF-8, as a field holds it."""
    return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8)


def bytes_to_text(content: Any) -> str:
    """The inverse, of bytes that are padded with zeros."""
    return bytes(np.asarray(content, dtype=np.uint8)).rstrip(b"\0").decode("utf-8", "replace")


class Memory:
    """Texts that are found again by what they have in common with another: cosine of TF-IDF of
    character trigrams."""

    def __init__(self, texts: Sequence[str]) -> None:
        grams = [_grams(text) for text in texts]
        of = np.repeat(np.arange(len(grams)), [len(each) for each in grams])
        pairs, counts = np.unique(of * _BUCKETS + np.concatenate(grams), return_counts=True)
        self._text, self._gram = pairs // _BUCKETS, pairs % _BUCKETS
        seen = np.bincount(self._gram, minlength=_BUCKETS)
        self._rarity = np.log((1 + len(grams)) / (1 + seen)) + 1
        self._values = counts * self._rarity[self._gram]
        self._norms = np.sqrt(np.bincount(self._text, self._values**2, minlength=len(grams)))

    def nearest(self, text: str) -> int:
        """Number of the text that is most like this one; the first of several."""
        wanted = np.bincount(_grams(text), minlength=_BUCKETS) * self._rarity
        products = self._values * wanted[self._gram]
        scores = np.bincount(self._text, products, minlength=len(self._norms))
        return int((scores / np.maximum(self._norms, 1e-12)).argmax())


def _grams(text: str) -> NDArray[np.int64]:
    """Trigrams of a text, blanks around it, each as a number below `_BUCKETS`."""
    codes = np.array([ord(each) for each in f" {text.lower()} "], dtype=np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(codes, (0, _GRAM)), _GRAM)
    return windows @ np.array([1, 1_000_003, 998_244_353]) % _BUCKETS
