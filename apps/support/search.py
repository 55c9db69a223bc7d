"""Finds articles by words (BM25) and by an encoder together, and the passage to quote.

Both scores of a question are brought to mean 0 and deviation 1 over all articles and added. How
sure an answer is, is told by one of two signs: by how much the best article stands above the second
(margin), or how much of the question stands in its title, rare words counting more (title). Which,
and from which value on answers are given, is found on questions whose answer is known, with every
fifth right article taken out, so that a given share of all answers is right.

Shapes: Q questions, A articles, D numbers of a vector.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import bm25s
import numpy as np
from numpy.typing import NDArray

from apps.support.articles import Article
from apps.texts import words_of

PRECISION = 0.7
MARGIN, TITLE = "margin", "title"
FEW = 50
"""Questions that a threshold is found with, at least."""

_TIES = 0.05  # of the margin, since many titles have all words of a question
_SHORT = 40  # characters: a passage is longer, if its article is

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Threshold:
    """From which value on an answer is given, and what that means on the questions it is from."""

    sign: str = MARGIN
    value: float = 0.0
    precision: float = 0.0
    """Of the answers that are given, right ones."""
    coverage: float = 0.0
    """Of the questions that have an answer, those that get one."""
    questions: int = 0

    def __str__(self) -> str:
        if not self.questions:
            return "no threshold yet: every question gets the nearest article (give --questions)"
        return (
            f"answers are given from a {self.sign} of {self.value:.2f} on: "
            f"{100 * self.precision:.0f} % of them are "
            f"right, and {100 * self.coverage:.0f} % of the questions with an answer get one "
            f"({self.questions:,} questions, every fifth right article taken out)"
        )

    def to_json(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))

    @classmethod
    def of(
        cls,
        signs: Mapping[str, Floats],
        *,
        right: NDArray[np.bool_],
        possible: NDArray[np.bool_],
        precision: float = PRECISION,
    ) -> Threshold:
        """The sign that lets most questions be answered: of each sign the values [Q].

        `right` [Q]: the best article is right; `possible` [Q]: there is a right one.
        """
        found = [cls(next(iter(signs)), float("inf"), 0.0, 0.0, len(right))]
        for sign, sure in signs.items():
            order = np.argsort(-sure, kind="stable")
            shares = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
            whole = np.append(np.diff(sure[order]) < 0, True)  # questions as sure go together
            enough = np.flatnonzero((shares >= precision) & whole)
            if len(enough):
                last = int(enough[-1])
                covered = possible[order[: last + 1]].sum() / max(1, possible.sum())
                value, share = float(sure[order[last]]), float(shares[last])
                found.append(cls(sign, value, share, float(covered), len(right)))
        return max(found, key=lambda each: each.coverage)


def taken_out(names: Sequence[str]) -> NDArray[np.bool_]:
    """Every fifth article, by its name."""
    bits = (hashlib.blake2b(each.encode(), digest_size=1).digest()[0] for each in names)
    return np.array([each % 5 == 0 for each in bits], dtype=bool)


def sureness(scores: Floats) -> Floats:
    """By how much the best of scores [Q, A] stands above the second [Q]."""
    if scores.shape[1] < 2:
        return np.zeros(len(scores))
    most = np.sort(scores, axis=1)[:, -2:]
    found: Floats = most[:, 1] - most[:, 0]
    return found


def _standard(scores: Floats) -> Floats:
    spread = scores.std(axis=-1, keepdims=True)
    found: Floats = (scores - scores.mean(axis=-1, keepdims=True)) / np.maximum(spread, 1e-9)
    return found


class Index:
    """Articles as they can be searched. Never changed: a new one takes its place."""

    def __init__(self, articles: Sequence[Article], vectors: NDArray[np.float32] | None) -> None:
        self.articles, self.vectors = list(articles), vectors
        self.places = {each.id: place for place, each in enumerate(self.articles)}
        self._words = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
        texts = [each.words for each in self.articles]
        counts = Counter(word for text in texts for word in set(text))
        self._idf = {w: float(np.log(1 + len(texts) / count)) for w, count in counts.items()}
        if counts:
            self._words.index([text or [""] for text in texts], show_progress=False)

    def knows(self, question: str) -> bool:
        """Whether any word of a question stands anywhere."""
        return any(word in self._idf for word in words_of(question))

    def scores(self, question: str, vector: NDArray[np.float32] | None) -> Floats:
        """Of all articles [A]; by words alone where there is no vector."""
        asked = [word for word in words_of(question) if word in self._idf]
        found = np.zeros(len(self.articles))
        if asked:
            found += _standard(np.asarray(self._words.get_scores(asked), dtype=np.float64))
        if vector is not None and self.vectors is not None and len(self.articles):
            found += _standard((self.vectors @ vector).astype(np.float64))
        return found

    def in_title(self, place: int, question: str) -> float:
        """How much of a question stands in an article's title, 0 to 1, rare words counting more."""
        rare = float(np.log(1 + len(self.articles)))  # of words that stand nowhere
        asked = {word: self._idf.get(word, rare) for word in words_of(question)}
        title = set(words_of(self.articles[place].title))
        return sum(asked[word] for word in asked.keys() & title) / max(1e-9, sum(asked.values()))

    def signs(self, scores: Floats, place: int, question: str) -> dict[str, float]:
        """How sure the article at `place`, the best, is."""
        margin = float(sureness(scores[None])[0])
        return {MARGIN: margin, TITLE: self.in_title(place, question) + _TIES * margin}

    def best(self, scores: Floats, *, count: int) -> list[int]:
        """Places of the best articles."""
        order: list[int] = np.argsort(-scores, kind="stable")[:count].tolist()
        return order

    def passage(self, article: Article, question: str) -> str:
        """The paragraph of an article that has most of a question's words, rare ones counting more.

        One that is very short, or leads to a list, is quoted with those that follow.
        """
        asked, lines = set(words_of(question)), article.paragraphs
        weights = [
            sum(self._idf.get(word, 0.0) for word in asked & set(words_of(line))) for line in lines
        ]
        at = max(range(len(lines)), key=lambda place: (weights[place], -place))
        quoted = [lines[at]]
        for line in lines[at + 1 :]:
            if len(" ".join(quoted)) >= _SHORT and not quoted[-1].endswith((":", "：")):
                break
            quoted.append(line)
        return "\n".join(quoted)


def right_of(index: Index, pairs: Sequence[tuple[str, str]]) -> tuple[list[str], Any]:
    """Distinct questions, and which articles [Q, A] answer each."""
    questions = {question: n for n, question in enumerate(dict.fromkeys(q for q, _ in pairs))}
    right = np.zeros((len(questions), len(index.articles)), dtype=bool)
    for question, name in pairs:
        if name in index.places:
            right[questions[question], index.places[name]] = True
    return list(questions), right
