"""What a dictionary finds: names of the training part, looked up in the texts that are scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from shoal.fields import IGNORED
from shoal.tasks.spans import precision_recall_f1, spans_of
from shoal.tasks.task import Sample

Key = tuple[int, ...]
"""A name: the ids of all pieces of its words."""


class Dictionary:
    """Names as they are tagged most often, unless more often they are none.

    Of overlapping names in a text the first counts, and of those that begin together the longest.
    """

    def __init__(self, rows: Sequence[Sample], *, tags: Sequence[str]) -> None:
        """`rows`: samples with `input_ids` and `labels`, which are read twice."""
        self._tags = tags
        self._closing = _closing(rows)
        found: dict[Key, Counter[str]] = {}
        lengths: dict[Key, set[int]] = {}
        sentences = [self._sentence(row) for row in rows]
        for words, spans in sentences:
            for kind, start, stop in spans:
                found.setdefault(_key(words[start:stop]), Counter())[kind] += 1
                lengths.setdefault(words[start], set()).add(stop - start)
        self._types = {key: kinds.most_common(1)[0][0] for key, kinds in found.items()}
        self._lengths = {word: sorted(some, reverse=True) for word, some in lengths.items()}
        seen = Counter(
            _key(words[start:stop]) for words, _ in sentences for _, start, stop in self._in(words)
        )
        rare = [key for key, kinds in found.items() if 2 * kinds.total() < seen[key]]
        for key in rare:
            del self._types[key]

    def f1(self, rows: Iterable[Sample]) -> float:
        """Entity F1 of what it finds in `rows`."""
        correct = predicted = gold = 0
        for row in rows:
            words, spans = self._sentence(row)
            guess = self._in(words)
            correct += len(set(guess) & set(spans))
            predicted += len(guess)
            gold += len(spans)
        return precision_recall_f1(correct=correct, predicted=predicted, gold=gold)[2]

    def _sentence(self, row: Sample) -> tuple[list[Key], list[tuple[str, int, int]]]:
        """The words of a sample, and its names over them: (type, first word, end)."""
        ids, labels = list(map(int, row["input_ids"])), list(map(int, row["labels"]))
        if self._closing is not None and ids[-1] == self._closing:
            ids, labels = ids[:-1], labels[:-1]
        starts = [place for place, label in enumerate(labels) if label != IGNORED]
        words = [tuple(ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)])]
        return words, spans_of([self._tags[labels[place]] for place in starts])

    def _in(self, words: Sequence[Key]) -> list[tuple[str, int, int]]:
        found, at = [], 0
        while at < len(words):
            for length in self._lengths.get(words[at], ()):
                kind = self._types.get(_key(words[at : at + length]))
                if kind is not None and at + length <= len(words):
                    found.append((kind, at, at + length))
                    at += length - 1
                    break
            at += 1
        return found


def _key(words: Sequence[Key]) -> Key:
    return tuple(piece for word in words for piece in word)


def _closing(rows: Sequence[Sample]) -> int | None:
    """The special token that ends every row, and belongs to no word; None where there is none."""
    ends = {(int(row["input_ids"][-1]), int(row["labels"][-1])) for row in rows[:100]}
    (only,) = ends if len(ends) == 1 else ((0, 0),)
    return only[0] if only[1] == IGNORED else None
