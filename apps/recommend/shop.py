"""Ranks items for a user, with a reason for each; takes events and items as they come."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from apps.command import Missing
from apps.recommend.catalogue import Catalogue, Item
from apps.recommend.taste import FEW, Content, Floats, Neighbours, Transformer, standard
from apps.served import NotServed
from shoal import UserError

MOST = 100
"""Items of one answer."""

_POOL = 200  # items among which diversity chooses


class Shop:
    """What is known of all items and users, in memory; SQLite has it too."""

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        transformer: Transformer | None = None,
        weight: float = 0.5,
        age: float = 5.0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`weight`: the transformer's beside the neighbours; `age`: in items, of a history."""
        self.catalogue, self._transformer, self._say = catalogue, transformer, say
        self._weight, self._age = weight if transformer else 0.0, age
        self.items = catalogue.items()
        self.places = {each.id: n for n, each in enumerate(self.items)}
        found = [self._numbers(each) for each in catalogue.histories().values()]
        histories = [each for each in found if each]
        self.neighbours = Neighbours(histories, num_items=len(self.items))
        self._content = Content(self.items, histories) if histories else None
        self._lock = threading.Lock()

    def _numbers(self, ids: Sequence[str]) -> list[int]:
        return [self.places[each] for each in ids if each in self.places]

    def put(self, id: str, *, title: str, genres: list[Any], expires: float | None) -> Item:
        """Add or replace an item; it can be recommended at once. Raises UserError."""
        if not title.strip() or len(id) > 100 or not all(isinstance(g, str) for g in genres):
            raise UserError(f"{id[:60]}: expected a title, and genres as texts")
        if expires is not None and not math.isfinite(expires):
            raise UserError(f"{id[:60]}: expected expires in seconds since 1970, got {expires}")
        item = Item(id, title.strip(), tuple(g.replace("|", " ") for g in genres), expires)
        with self._lock:
            self.catalogue.put([item])
            place = self.places.setdefault(id, len(self.items))
            if place == len(self.items):
                self.items.append(item)
                self.neighbours.grow(len(self.items))
            self.items[place] = item
            if self._content is not None:
                self._content.put(place, item)
        return item

    def take(self, user: str, item: str) -> dict[str, Any]:
        """An event; the next answer knows it. Raises Missing, UserError."""
        with self._lock:
            before = self._numbers(self.catalogue.history(user))
            at = self.catalogue.take(user, item)
            self.neighbours.add(before, self.places[item])
        return {"user": user, "item": item, "at": at}

    def scores(self, history: Sequence[str]) -> Floats:
        """Of all items [V], higher is better."""
        numbers = self._numbers(history)
        if not numbers or self._content is None:
            return self.neighbours.counts.astype(np.float32)
        content = standard(self._content.scores(numbers))
        near = standard(self.neighbours.shares(numbers, age=self._age).sum(axis=0))
        near = np.where(self.neighbours.counts < FEW, content, near)
        made = self._transformed(history, instead=content) if self._weight else near
        found: Floats = self._weight * made + (1 - self._weight) * near
        return found

    def _transformed(self, history: Sequence[str], *, instead: Floats) -> Floats:
        assert self._transformer is not None
        try:
            known = self._transformer.scores(history)
        except NotServed as error:
            self._say(f"ranked without the transformer: {error}")
            known = None
        if known is None:
            return instead
        found, scores = instead.copy(), standard(known)
        for name, number in self._transformer.ids.items():
            if name in self.places and self.neighbours.counts[self.places[name]] >= FEW:
                found[self.places[name]] = scores[number]
        return found

    def recommend(self, user: str, *, count: int = 10, diversity: float = 0.0) -> dict[str, Any]:
        """The best items that the user has not taken and that have not expired, with reasons.

        `diversity` 0 to 1: how much an item that is like one above it falls. A user who is not
        known gets what most people took, and is told so.
        """
        if not 1 <= count <= MOST or not 0 <= diversity <= 1:
            raise UserError(f"expected a count of 1 to {MOST} and a diversity of 0 to 1")
        with self._lock:
            history, now = self.catalogue.history(user), time.time()
            scores = self.scores(history)
            for place, each in enumerate(self.items):
                if each.expires is not None and each.expires <= now:
                    scores[place] = -np.inf
            scores[self._numbers(history)] = -np.inf
            chosen = self._diverse(scores, count=count, diversity=diversity)
            reasons = self._reasons(self._numbers(history), chosen)
            shown = [
                {"id": each.id, "title": each.title, "genres": list(each.genres), "reason": reason}
                for each, reason in zip((self.items[place] for place in chosen), reasons)
            ]
        return {"user": user, "known": bool(history), "items": shown}

    def _diverse(self, scores: Floats, *, count: int, diversity: float) -> list[int]:
        """Greedily the best, less the share of genres it has in common with those above it.

        Maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998).
        """
        order = [int(n) for n in np.argsort(-scores, kind="stable") if np.isfinite(scores[n])]
        if not diversity:
            return order[:count]
        left, chosen = order[:_POOL], list[int]()
        like = dict.fromkeys(left, 0.0)
        low, span = scores[left].min(), max(float(np.ptp(scores[left])), 1e-9)
        while left and len(chosen) < count:
            gains = [(1 - diversity) * (scores[n] - low) / span - diversity * like[n] for n in left]
            best = left.pop(int(np.argmax(gains)))
            chosen.append(best)
            own = set(self.items[best].genres)
            for n in left:
                other = set(self.items[n].genres)
                like[n] = max(like[n], len(own & other) / max(1, len(own | other)))
        return chosen

    def _reasons(self, numbers: Sequence[int], chosen: Sequence[int]) -> list[dict[str, Any]]:
        """Why each: what others took near it, else a genre in common, else how many took it."""
        shares = self.neighbours.shares(numbers, age=self._age) if numbers else None
        return [self._reason(numbers, place, shares=shares) for place in chosen]

    def _reason(
        self, numbers: Sequence[int], place: int, *, shares: Floats | None
    ) -> dict[str, Any]:
        if shares is not None and shares[:, place].max() > 0:
            other = self.items[numbers[int(shares[:, place].argmax())]]
            return {"kind": "near", "item": other.id, "title": other.title}
        for other in (self.items[number] for number in reversed(numbers)):
            both = [g for g in self.items[place].genres if g and g in other.genres]
            if both:
                told = {"item": other.id, "title": other.title}
                return {"kind": "genre", "genre": both[0], **told}
        return {"kind": "taken", "count": int(self.neighbours.counts[place])}

    def user(self, user: str) -> dict[str, Any]:
        """What a user took, the newest first. Raises Missing."""
        history = self.catalogue.history(user)
        if not history:
            raise Missing(f"nobody is known as {user[:60]!r}; the first POST /events makes them so")
        last = [self.items[n] for n in reversed(self._numbers(history)[-20:])]
        return {"user": user, "taken": [{"id": each.id, "title": each.title} for each in last]}
