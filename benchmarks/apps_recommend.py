"""Recommendation on MovieLens: new items, events, reasons, and ranking with and without the model.

    python benchmarks/apps_recommend.py [--model runs/recommend-001] [--users 200]

Of each user the last item is kept back and is to be found among all that were not taken (NDCG@10).
New items: a fifth of the items is taken out of all histories, and each user's are searched among
that fifth, by the content tower and by how popular items with those words are (recall@10). Then for
each user: does one event change the next answer, and is every reason of ten items true.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where apps/ is

from apps.recommend.__main__ import chosen
from apps.recommend.catalogue import Catalogue, Item
from apps.recommend.shop import Shop
from apps.recommend.taste import REACH, Content, Transformer
from apps.served import fetched


def catalogue_of(path: Path, *, folder: Path, keep_back: int) -> tuple[Catalogue, dict[str, str]]:
    """A catalogue without the last items of each user, and the last item of each."""
    made = Catalogue(folder / "bench.sqlite3")
    made.read(path)
    last = {}
    for user, history in made.histories().items():
        if len(history) > 3 and keep_back:
            last[user] = history[-1]
            made.rows("delete from events where user = ? and item = ?", user, history[-1])
    return made, last


class Truth:
    """What reasons are held against: the events alone, read again."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._histories = catalogue.histories()
        self._items: dict[str, Item] = {each.id: each for each in catalogue.items()}

    def holds(self, reason: dict[str, Any], *, user: str, item: str) -> bool:
        """Whether a reason to show `item` to `user` is true."""
        if reason["kind"] == "taken":
            return sum(each.count(item) for each in self._histories.values()) == reason["count"]
        other = reason["item"]
        if other not in self._histories.get(user, []):
            return False
        if reason["kind"] == "genre":
            both = {*self._items[item].genres} & {*self._items[other].genres}
            return reason["genre"] in both
        return any(
            abs(a - b) <= REACH
            for taken in self._histories.values()
            if item in taken and other in taken
            for a, one in enumerate(taken)
            if one == item
            for b, two in enumerate(taken)
            if two == other
        )


def recall(scores: Any, wanted: Any) -> float:
    """Of what each user took, the share among the ten best; at most ten are asked of anybody."""
    some = wanted.sum(axis=1) > 0
    best = np.argsort(-scores[some], axis=1, kind="stable")[:, :10]
    hits = np.take_along_axis(wanted[some], best, axis=1).sum(axis=1)
    return float((hits / np.minimum(wanted[some].sum(axis=1), 10)).mean())


def new_items(shop: Shop) -> None:
    """A fifth of the items taken out of all histories."""
    cold = np.random.default_rng(0).permutation(len(shop.items))[: len(shop.items) // 5]
    is_cold = np.isin(np.arange(len(shop.items)), cold)
    whole = [[shop.places[item] for item in each] for each in shop.catalogue.histories().values()]
    warm = [[n for n in each if not is_cold[n]] for each in whole]
    wanted = np.array([[n in set(each) for n in cold] for each in whole])
    kept = [n for n, each in enumerate(warm) if each]
    tower = Content(shop.items, [warm[n] for n in kept])
    scores = np.stack([tower.scores(warm[n])[cold] for n in kept])
    popular = np.tile(scores.mean(axis=0), (len(kept), 1))
    print(
        f"items that nobody took yet ({len(cold)}), recall@10: "
        f"content {recall(scores, wanted[kept]):.3f}"
        f", popularity of their words {recall(popular, wanted[kept]):.3f}, "
        f"chance {10 / len(cold):.3f}",
        flush=True,
    )


def main() -> None:
    """Print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--users", type=int, default=200)
    given = parser.parse_args()
    with ExitStack() as ending:
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory()))
        catalogue, last = catalogue_of(fetched("movielens", say=print), folder=folder, keep_back=1)
        ending.callback(catalogue.close)
        transformer, weight, age = None, 0.0, 5.0
        if given.model:
            settings = ["replicate=1", "threads=1"]
            transformer = Transformer(given.model, scratch=folder, settings=settings, say=print)
            ending.callback(transformer.close)
            weight, age = chosen(given.model)
        shop = Shop(catalogue, transformer=transformer, weight=weight, age=age)
        new_items(shop)
        users = random.Random(0).sample(sorted(last), min(given.users, len(last)))
        gains, changed, reasons, lies, times = [], 0, 0, 0, []
        for user in users:
            start = time.perf_counter()
            items = [each["id"] for each in shop.recommend(user, count=10)["items"]]
            times.append(time.perf_counter() - start)
            gains.append(1 / np.log2(items.index(last[user]) + 2) if last[user] in items else 0.0)
        truth = Truth(catalogue)
        for user in users[:30]:
            items = shop.recommend(user, count=10)["items"]
            for each in items:
                reasons += 1
                lies += not truth.holds(each["reason"], user=user, item=each["id"])
            shop.take(user, items[4]["id"])
            after = [each["id"] for each in shop.recommend(user, count=10)["items"]]
            changed += after != [each["id"] for each in items] and items[4]["id"] not in after
        print(
            f"NDCG@10 of the last item {np.mean(gains):.3f} ({len(users)} users; the transformer "
            f"counts {weight:.1f}); an answer takes {1000 * np.median(times):.0f} ms"
        )
        print(f"an event changed the next answer of {changed} of 30 users")
        print(f"reasons: {reasons - lies} of {reasons} true")


if __name__ == "__main__":
    main()
