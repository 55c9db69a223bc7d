"""What a search finds: by vectors, by words (BM25), and by both together.

Each source of the data is an index of its own: its distinct texts, in which its questions are
searched. numpy, no torch. Shapes: N rows of the data, Q questions and V texts of one source, D
numbers of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.splitmix import mixed
from shoal.tasks.pictures import OTHER, QUIET, STRONG, new_figure, save
from shoal.tasks.task import Batch, Evaluated, Named, Scores, Vector

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Answered = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]

RANKS = (1, 5, 10)
"""Recall is told at these places."""

PRECISION = 0.9
"""Of the answers that are given, where some questions have none."""

_MISSING = 5  # every fifth text that is asked for is taken out
_SATURATION, _LENGTH = 1.2, 0.75  # k1 and b of BM25, as Lucene has them
_PLACES = 20  # in the picture


def bm25(texts: Sequence[Ints], questions: Sequence[Ints]) -> Floats:
    """Scores [Q, V] of texts for questions, both words as numbers (Robertson and Zaragoza 2009).

    idf = log(1 + (V - n + 0.5) / (n + 0.5)), which is never negative. doi 10.1561/1500000019
    """
    lengths = np.array([len(text) for text in texts], dtype=np.float64)
    norm = _SATURATION * (1 - _LENGTH + _LENGTH * lengths / max(lengths.mean(), 1e-9))
    wanted = np.unique(np.concatenate([*questions, np.zeros(0, np.int64)]))
    places: dict[int, list[tuple[int, int]]] = {int(word): [] for word in wanted}
    for number, text in enumerate(texts):
        for word, count in zip(*np.unique(text, return_counts=True)):
            if int(word) in places:
                places[int(word)].append((number, int(count)))
    scores = np.zeros((len(questions), len(texts)))
    weighed: dict[int, tuple[Ints, Floats]] = {}
    for word, found in places.items():
        where, counts = np.array(found, dtype=np.int64).reshape(-1, 2).T
        idf = math.log(1 + (len(texts) - len(where) + 0.5) / (len(where) + 0.5))
        weighed[word] = where, idf * counts * (_SATURATION + 1) / (counts + norm[where])
    for number, question in enumerate(questions):
        for word in question:
            where, values = weighed[int(word)]
            scores[number, where] += values
    return scores


@dataclass(frozen=True)
class Searched:
    """One source: its texts, questions, and what answers them.

    `text_rows` [V] and `question_rows` [Q] are rows of the data; `right` [Q, V] says which texts
    answer a question; `by_words` [Q, V] are the scores of BM25.
    """

    name: str
    text_rows: Ints
    question_rows: Ints
    right: NDArray[np.bool_]
    by_words: Floats
    missing: NDArray[np.bool_]
    """Texts [V] that are taken out to see what is answered then."""


@dataclass(frozen=True)
class Index:
    """The rows that are scored, and each source with what is searched there."""

    rows: Mapping[tuple[int, int], int]
    """Number of each row by its (source, sample)."""
    sources: Sequence[Searched]

    @classmethod
    def of(cls, data: Evaluated, *, identity: Callable[[Mapping[str, Any]], Ints]) -> Index:
        """Of all rows of `data`; `identity` gives the ids of a row's question and text."""
        rows: dict[tuple[int, int], int] = {}
        found: dict[int, list[tuple[int, int, int, Mapping[str, Any]]]] = {}
        for number, row in enumerate(data.rows()):
            query, text = (int(each) for each in identity(row)[:2])
            source = int(row["source_ids"])
            rows[source, int(row["sample_ids"])] = number
            found.setdefault(source, []).append((number, query, text, row))
        return cls(rows, [_searched(data.names[each], found[each]) for each in sorted(found)])

    def found_by_words(self) -> Named:
        """Scores of BM25 alone."""
        return self.named([_Found(each, each.by_words) for each in self.sources], "bm25_")

    def named(self, found: Sequence[_Found], prefix: str) -> Named:
        """Recall and coverage of all questions, and of each source where there are several."""
        parts = [("", list(found))]
        parts += [(f"/{each.source.name}", [each]) for each in found if len(found) > 1]
        named: Named = {}
        for end, some in parts:
            ranks = np.concatenate([each.ranks for each in some])
            for most in RANKS:
                named[f"{prefix}recall_{most}{end}"] = float((ranks < most).mean())
            named[f"{prefix}mrr{end}"] = float((1 / (ranks + 1)).mean())
            named[f"{prefix}coverage{end}"] = coverage([each.answered for each in some])
        return named


def _searched(name: str, rows: Sequence[tuple[int, int, int, Mapping[str, Any]]]) -> Searched:
    texts = {text: (number, row) for number, _, text, row in reversed(rows)}
    order = {text: place for place, text in enumerate(sorted(texts))}
    asked = [(number, query, row) for number, query, _, row in rows if query]
    answers: dict[int, list[int]] = {}
    for _, query, text, _ in rows:
        answers.setdefault(query, []).append(order[text])
    right = np.zeros((len(asked), len(order)), dtype=bool)
    for place, (_, query, _) in enumerate(asked):
        right[place, answers[query]] = True
    known = [texts[text] for text in order]
    ids = np.array(list(order), dtype=np.uint64)
    return Searched(
        name,
        np.array([number for number, _ in known]),
        np.array([number for number, _, _ in asked], dtype=np.int64),
        right,
        bm25(
            [np.asarray(row["words"]) for _, row in known],
            [np.asarray(row["asked"]) for _, _, row in asked],
        ),
        right.any(axis=0) & (mixed(ids) % np.uint64(_MISSING) == 0),
    )


@dataclass(frozen=True)
class _Found:
    """What scores [Q, V] find in a source."""

    source: Searched
    scores: Floats

    @property
    def ranks(self) -> Floats:
        """Place from 0 of the first right text of each question; of equal scores the middle."""
        own = np.where(self.source.right, self.scores, -np.inf).max(axis=1, keepdims=True)
        above, equal = (self.scores > own).sum(axis=1), (self.scores == own).sum(axis=1) - 1
        found: Floats = above + np.maximum(equal, 0) // 2
        return found

    @property
    def answered(self) -> Answered:
        """Where texts are missing: how sure the best answer is, whether it is right, can be [Q].

        Sure is what stands out: by how much the best score is above the second.
        """
        kept = ~self.source.missing
        scores, right = self.scores[:, kept], self.source.right[:, kept]
        best, lines = scores.argmax(axis=1), np.arange(len(scores))
        most = np.sort(scores, axis=1)[:, -2:]
        found: Answered = (most[:, -1] - most[:, 0], right[lines, best], np.any(right, axis=1))
        return found


def coverage(parts: Sequence[Answered]) -> float:
    """Share of the questions with an answer that get one, when answers are given from that score on
    at which `PRECISION` of all that are given are right."""
    sure, right, possible = (np.concatenate(each) for each in zip(*parts))
    order = np.argsort(-sure, kind="stable")
    precision = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    enough = np.flatnonzero(precision >= PRECISION)
    given = order[: enough[-1] + 1] if len(enough) else order[:0]
    return float(possible[given].sum() / max(1, possible.sum()))


def standard(scores: Floats) -> Floats:
    """Scores [Q, V] of each question with mean 0 and deviation 1: those of two kinds add up."""
    deviation = scores.std(axis=1, keepdims=True)
    found: Floats = (scores - scores.mean(axis=1, keepdims=True)) / np.maximum(deviation, 1e-9)
    return found


class RetrievalMetrics:
    """The vectors of all rows [N, 2, D]: of the question and the text, 0 of what a row lacks."""

    needs_predictions = True
    examples: Sequence[Sequence[Any]] = ()

    def __init__(self, index: Index, *, width: int, temperature: float) -> None:
        self._index, self._heat = index, temperature
        self._vectors = np.zeros((len(index.rows), 2, width))

    def add(self, *, batch: Batch, scores: Scores) -> None:
        """Keep the vectors [B, K, D] of the batch's rows."""
        assert scores.predictions is not None, "retrieval is scored by vectors"
        vectors = np.asarray(scores.predictions.double())
        for row in np.flatnonzero(np.asarray(batch["sample_ids"]) >= 0):
            at = int(batch["source_ids"][row]), int(batch["sample_ids"][row])
            self._vectors[self._index.rows[at]] = vectors[row, :2]

    def vector(self) -> Vector:
        """All vectors in one."""
        return self._vectors.ravel().copy()

    def _cosines(self, vector: Vector | None) -> list[Floats]:
        """Of each source, the cosine of each question and text [Q, V]."""
        vectors = self._vectors if vector is None else vector.reshape(self._vectors.shape)
        return [
            vectors[each.question_rows, 0] @ vectors[each.text_rows, 1].T
            for each in self._index.sources
        ]

    def _ways(self, cosines: Sequence[Floats]) -> dict[str, list[_Found]]:
        sources = self._index.sources
        both = [standard(c) + standard(each.by_words) for c, each in zip(cosines, sources)]
        return {
            "": [_Found(*each) for each in zip(sources, both)],
            "encoder_": [_Found(*each) for each in zip(sources, cosines)],
            "bm25_": [_Found(each, each.by_words) for each in sources],
        }

    def result(self, vector: Vector | None = None) -> Named:
        """Recall, mean reciprocal rank and coverage of both together and of the encoder alone.

        `evaluation_loss`: nats of the right texts of a question among all of its source.
        """
        cosines = self._cosines(vector)
        named: Named = {}
        losses = []
        for each, found in zip(self._index.sources, cosines):
            logits = found / self._heat
            right = np.where(each.right, logits, -np.inf)
            losses.append(_log_sum(logits) - _log_sum(right))
            if len(cosines) > 1:
                named[f"evaluation_loss/{each.name}"] = float(losses[-1].mean())
        for prefix, ways in self._ways(cosines).items():
            if prefix != "bm25_":
                named |= self._index.named(ways, prefix)
        whole = np.concatenate(losses)
        named["evaluation_loss"] = float(whole.mean())
        return {**named, "evaluation_targets": float(len(whole))}

    def shown(self, vector: Vector, examples: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Recall at each of the first places, of each source and way."""
        ways = self._ways(self._cosines(vector))
        places = np.arange(1, _PLACES + 1)
        return {
            "sources": [
                {
                    "name": each.name,
                    "questions": len(each.question_rows),
                    "texts": len(each.text_rows),
                    "recall": {
                        prefix: (found[n].ranks[:, None] < places).mean(axis=0).tolist()
                        for prefix, found in ways.items()
                    },
                }
                for n, each in enumerate(self._index.sources)
            ]
        }


def _log_sum(logits: Floats) -> Floats:
    highest = logits.max(axis=1, keepdims=True)
    found: Floats = highest[:, 0] + np.log(np.exp(logits - highest).sum(axis=1))
    return found


def draw_retrieval(shown: Mapping[str, Any], path: Path) -> None:
    """A panel for each source: how many of its questions have the right text among the first k."""
    sources = shown["sources"]
    figure = new_figure(4.4 * len(sources), 3.6)
    for axes, source in zip(figure.subplots(1, len(sources), squeeze=False)[0], sources):
        for prefix, name, colour in (
            ("", "both together", STRONG),
            ("encoder_", "encoder", OTHER),
            ("bm25_", "BM25", QUIET),
        ):
            recall = source["recall"][prefix]
            axes.plot(range(1, len(recall) + 1), recall, color=colour, label=name)
        axes.set_title(
            f"{source['name']}: {source['questions']:,} questions, {source['texts']:,} texts",
            fontsize=9,
        )
        axes.set_ylim(0, 1.02)
        axes.set_xticks([1, *range(5, _PLACES + 1, 5)])
        axes.set_xlabel("first k texts")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("questions with the right text")
    figure.axes[0].legend(loc="lower right")
    save(figure, path)
