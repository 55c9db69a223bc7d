"""Recommending without a model: what popularity, neighbours in time and linear models say.

A history is a user's items, oldest first, as numbers 0..V-1. Counts come from the training part of
histories only (`trained`: all but the last two items). numpy, no torch.
Shapes: V items, H items of one history, U users.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]

AGES = (2.0, 3.0, 5.0, 10.0)
"""An item of a history counts exp(-how many came after it / age)."""

RANKED = 10
"""Places of a list: what comes after it counts for nothing."""

DENSE_ITEMS = 6000
"""Items up to which tables of V x V are made (144 MB each)."""

_REACH = 10  # items apart that two items of a history may be to count as neighbours
_SHRINK = 10.0  # added to the norm of a similarity, so that rare pairs count less
_RIDGES = (100.0, 300.0)  # of EASE


@dataclass(frozen=True)
class History:
    """What a user took, with the two items that are held out last."""

    items: Ints

    @property
    def trained(self) -> Ints:
        """What may be learned from."""
        return self.items[:-2]

    @property
    def questions(self) -> tuple[tuple[Ints, int], tuple[Ints, int]]:
        """(what was seen, what came next) of the validation item, and of the test item."""
        items = self.items
        return (items[:-2], int(items[-2])), (items[:-1], int(items[-1]))


class Neighbours:
    """Items that are taken soon after one another, in either order.

    The similarity of two items is the sum of 1 / distance over the places where they stand within
    ten items in somebody's history, over the root of the product of their counts plus ten.
    """

    def __init__(self, histories: Sequence[History], *, num_items: int) -> None:
        self.similarity = np.zeros((num_items, num_items), dtype=np.float32)
        counts = np.zeros(num_items)
        for history in histories:
            items = history.trained
            counts += np.bincount(items, minlength=num_items)
            for distance in range(1, min(_REACH, len(items) - 1) + 1):
                before, after = items[:-distance], items[distance:]
                np.add.at(self.similarity, (before, after), np.float32(1 / distance))
                np.add.at(self.similarity, (after, before), np.float32(1 / distance))
        root = np.sqrt(counts).astype(np.float32)
        self.similarity /= root[:, None] * root + np.float32(_SHRINK)
        np.fill_diagonal(self.similarity, 0)

    def scores(self, seen: Ints) -> Floats:
        """Scores [ages, V] of all items after a history [H]."""
        found: Floats = weights_of(seen) @ self.similarity[seen]
        return found


def weights_of(seen: Ints) -> Floats:
    """How much each item of a history counts, by the ages: [ages, H]."""
    after = np.arange(len(seen))[::-1]
    return np.exp(-after / np.array(AGES)[:, None]).astype(np.float32)


def rank_of(scores: NDArray[Any], *, seen: Ints, target: int) -> Ints:
    """Place of an item, from 0, among those that were not seen; of each row of scores [..., V].

    Of equal scores the item stands in the middle. An item that was seen comes after all.
    """
    kept = scores.copy()
    kept[..., seen] = -np.inf
    own = kept[..., target : target + 1]
    above, equal = (kept > own).sum(axis=-1), (kept == own).sum(axis=-1) - 1
    place = above + equal // 2
    behind = max(RANKED, scores.shape[-1])
    return np.where(np.isneginf(own[..., 0]), behind, place).astype(np.int64)


def gain_of(rank: NDArray[Any]) -> NDArray[np.float64]:
    """NDCG@10 of one relevant item at a rank from 0: 1 / log2(rank + 2), 0 behind the tenth.

    Jaervelin and Kekaelaeinen, 2002; the ideal list has the item first, so it divides by 1.
    """
    found = 1 / np.log2(np.asarray(rank, dtype=np.float64) + 2)
    return np.where(np.asarray(rank) < RANKED, found, 0.0)


def ease(histories: Sequence[History], *, num_items: int, ridge: float) -> NDArray[np.float64]:
    """EASE (Steck, arXiv 1905.03375): the linear model of a user's items by the others [V, V]."""
    gram = np.zeros((num_items, num_items))
    for history in histories:
        items = np.unique(history.trained)
        gram[np.ix_(items, items)] += 1
    gram[np.diag_indices(num_items)] += ridge
    inverse = np.linalg.inv(gram)
    found: NDArray[np.float64] = -inverse / np.diag(inverse)
    np.fill_diagonal(found, 0)
    return found


def linear_baselines(histories: Sequence[History], *, num_items: int) -> dict[str, float]:
    """NDCG@10 on the test item: popularity, EASE, and EASE on recent items, which is chosen on
    the validation item (ridge and age)."""
    counts = np.zeros(num_items)
    for history in histories:
        counts += np.bincount(history.trained, minlength=num_items)
    asked = [history.questions for history in histories]
    popular = [rank_of(counts, seen=seen, target=target) for _, (seen, target) in asked]
    found = {"popularity_ndcg": float(gain_of(np.array(popular)).mean())}
    if num_items > DENSE_ITEMS:
        return found
    best = -1.0
    for ridge in _RIDGES:
        table = ease(histories, num_items=num_items, ridge=ridge)
        ranks = np.array(
            [
                [
                    rank_of(
                        np.concatenate([np.ones((1, len(seen))), weights_of(seen)]) @ table[seen],
                        seen=seen,
                        target=target,
                    )
                    for seen, target in questions
                ]
                for questions in asked
            ]
        )  # [U, 2, 1 + ages]
        validation, test = gain_of(ranks).mean(axis=0)
        if ridge == _RIDGES[0]:
            found["ease_ndcg"] = float(test[0])
        age = int(validation[1:].argmax())
        if validation[1 + age] > best:
            best, found["recent_ease_ndcg"] = float(validation[1 + age]), float(test[1 + age])
    return found


class Described:
    """Items by the words of their texts: rows of a table [V, W], words of at least two items."""

    def __init__(self, texts: Sequence[str]) -> None:
        words = [set(re.findall(r"\w+", text.casefold())) for text in texts]
        counts = Counter(word for each in words for word in each)
        known = {word: n for n, word in enumerate(sorted(w for w, c in counts.items() if c > 1))}
        self.table = np.zeros((len(texts), len(known) + 1))
        self.table[:, -1] = 1  # of all items alike
        for row, each in enumerate(words):
            for word in each & known.keys():
                self.table[row, known[word]] = np.log(len(texts) / counts[word])

    @cached_property
    def num_words(self) -> int:
        """Columns but the last."""
        return self.table.shape[1] - 1


def cold_start(
    histories: Sequence[History], *, texts: Sequence[str], share: float = 0.2
) -> dict[str, float]:
    """Recall@10 of items that nobody is known to have taken, by their texts alone.

    A fifth of the items is taken out of all histories; then each user's ten best of that fifth are
    told by a bilinear model of the words of the rest of the history and the words of the item,
    fitted on the other items (ridge regression on both sides), and for comparison by popularity: of
    such items all that can be known is how popular items with those words are, which is the same
    model without the user. `cold_chance`: ten at random.
    """
    described, num_items = Described(texts), len(texts)
    if not described.num_words:
        return {}
    cold = np.zeros(num_items, dtype=bool)
    cold[np.random.default_rng(0).permutation(num_items)[: round(share * num_items)]] = True
    taken = np.zeros((len(histories), num_items))
    for row, history in enumerate(histories):
        taken[row, history.items] = 1
    warm, wanted = taken * ~cold, taken[:, cold]
    profiles = warm @ described.table
    profiles /= np.maximum(np.linalg.norm(profiles, axis=1, keepdims=True), 1e-9)
    same = np.ones((len(histories), 1))
    found: dict[str, float] = {}
    for name, sides in (("cold_text_recall", profiles), ("cold_popularity_recall", same)):
        scores = _bilinear(sides, described.table[~cold], warm[:, ~cold], described.table[cold])
        found[name] = _recall(scores, wanted)
    found["cold_chance_recall"] = RANKED / max(1, int(cold.sum()))
    return found


def _bilinear(
    users: NDArray[Any], items: NDArray[Any], taken: NDArray[Any], others: NDArray[Any]
) -> NDArray[np.float64]:
    """Scores of `others` for each user: U A F', with A the ridge solution of taken = U A F'."""
    left = np.linalg.solve(users.T @ users + np.eye(users.shape[1]), users.T @ taken @ items)
    ridge = 10.0 * np.eye(items.shape[1])
    right: NDArray[np.float64] = np.linalg.solve(items.T @ items + ridge, others.T)
    return users @ left @ right


def _recall(scores: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Of what each user took, the share among the ten best; at most ten are asked of anybody."""
    some = wanted.sum(axis=1) > 0
    best = np.argsort(-scores[some], axis=1, kind="stable")[:, :RANKED]
    hits = np.take_along_axis(wanted[some], best, axis=1).sum(axis=1)
    return (
        float((hits / np.minimum(wanted[some].sum(axis=1), RANKED)).mean()) if some.any() else 0.0
    )
