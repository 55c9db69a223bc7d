"""What somebody may want next: three scores of all items, and what may be said about them.

The transformer's: hidden state after the history times the table of items. Neighbours in time:
items that others took within ten places of those of the history, recent ones counting more. The
content tower: a linear map from the words of a history's titles and genres to those of an item, so
that an item that nobody took yet has a score. Each is brought to mean 0 and deviation 1 and they
are added; where one knows nothing of an item the content tower speaks for it.
Shapes: V items, U users, W words.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from apps.recommend.catalogue import Item
from apps.served import Served
from apps.texts import words_of
from shoal import ModelError

Floats = NDArray[np.float32]

REACH = 10
"""Places apart that two items of a history may be to count as neighbours."""

FEW = 3
"""An item that fewer people took is judged by its content."""

_SHRINK = 10.0
_RIDGE_USERS, _RIDGE_ITEMS = 1.0, 10.0


def standard(scores: NDArray[Any]) -> Floats:
    """Mean 0 and deviation 1."""
    found: Floats = ((scores - scores.mean()) / max(float(scores.std()), 1e-9)).astype(np.float32)
    return found


class Neighbours:
    """Items taken soon after one another, counted as events come."""

    def __init__(self, histories: Sequence[Sequence[int]], *, num_items: int) -> None:
        self.near = np.zeros((num_items, num_items), dtype=np.float32)
        self.counts = np.zeros(num_items)
        for history in histories:
            items = np.asarray(history, dtype=np.int64)
            self.counts += np.bincount(items, minlength=num_items)
            for distance in range(1, min(REACH, len(items) - 1) + 1):
                before, after = items[:-distance], items[distance:]
                np.add.at(self.near, (before, after), np.float32(1 / distance))
                np.add.at(self.near, (after, before), np.float32(1 / distance))

    def grow(self, num_items: int) -> None:
        """Make room for new items."""
        more = num_items - len(self.counts)
        self.near = np.pad(self.near, ((0, more), (0, more)))
        self.counts = np.pad(self.counts, (0, more))

    def add(self, before: Sequence[int], item: int) -> None:
        """Somebody who took `before` takes `item`."""
        self.counts[item] += 1
        for distance, other in enumerate(reversed(before[-REACH:]), 1):
            self.near[item, other] += 1 / distance
            self.near[other, item] += 1 / distance

    def shares(self, history: Sequence[int], *, age: float) -> Floats:
        """How much each item of a history adds to the score of each item [H, V]."""
        seen = np.asarray(history, dtype=np.int64)
        weights = np.exp(-np.arange(len(seen))[::-1] / age)
        norms = np.sqrt(np.outer(self.counts[seen], self.counts)) + _SHRINK
        found: Floats = (weights[:, None] * self.near[seen] / norms).astype(np.float32)
        found[:, seen] = 0
        return found


class Content:
    """The content tower, fitted by ridge regression on both sides."""

    def __init__(self, items: Sequence[Item], histories: Sequence[Sequence[int]]) -> None:
        words = [set(_words(each)) for each in items]
        counts = Counter(word for each in words for word in each)
        self._known = {w: n for n, w in enumerate(sorted(w for w, c in counts.items() if c > 1))}
        self._weights = np.array([np.log(len(items) / counts[word]) for word in self._known])
        self.table = self._rows(items)
        profiles, taken = self._profiles(histories), np.zeros((len(histories), len(items)))
        for row, history in enumerate(histories):
            taken[row, list(history)] = 1
        asked = profiles.T @ profiles + _RIDGE_USERS * np.eye(profiles.shape[1])
        told = self.table.T @ self.table + _RIDGE_ITEMS * np.eye(self.table.shape[1])
        left = np.linalg.solve(asked, profiles.T @ taken @ self.table)
        self._map = np.linalg.solve(told, left.T).T

    def _rows(self, items: Sequence[Item]) -> NDArray[np.float64]:
        """Words [V, W + 1]; the last is of all items alike."""
        table = np.zeros((len(items), len(self._known) + 1))
        table[:, -1] = 1
        for row, each in enumerate(items):
            for word in set(_words(each)) & self._known.keys():
                table[row, self._known[word]] = self._weights[self._known[word]]
        return table

    def _profiles(self, histories: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        found = np.stack([self.table[list(each)].sum(axis=0) for each in histories])
        norms = np.linalg.norm(found, axis=1, keepdims=True)
        profiles: NDArray[np.float64] = found / np.maximum(norms, 1e-9)
        return profiles

    def put(self, place: int, item: Item) -> None:
        """A new item, or other words of one."""
        more = max(0, place + 1 - len(self.table))
        self.table = np.pad(self.table, ((0, more), (0, 0)))
        self.table[place] = self._rows([item])[0]

    def scores(self, history: Sequence[int]) -> NDArray[np.float64]:
        """Of all items [V]."""
        found: NDArray[np.float64] = self._profiles([history])[0] @ self._map @ self.table.T
        return found


def _words(item: Item) -> list[str]:
    return words_of(" ".join([item.title, *item.genres]))


class Transformer:
    """A run of the recipe `recommend`, served: hidden states from the server, items in numpy."""

    def __init__(self, run: Path, *, scratch: Path, settings: Sequence[str], say: Any) -> None:
        """Raises ModelError for a folder that is no such run."""
        folder = run / "model" if (run / "model").is_dir() else run
        try:
            listed = json.loads((folder / "items.json").read_text(encoding="utf-8"))
            self.ids = {str(each["item"]): n for n, each in enumerate(listed)}
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{run}: expected a run of the recipe recommend, with model/items.json ({error}); "
                "shoal train recommend --out runs/recommend-001 makes one"
            ) from None
        self._table = _item_table(folder, rows=int(config["vocab_size"]))[: len(self.ids)]
        self._most = int(config.get("max_position_embeddings", 200))
        self._served = Served(
            with_tokenizer(folder, scratch, num=len(self.ids)), settings=settings, say=say
        )
        self.close = self._served.close

    def scores(self, history: Sequence[str]) -> Floats | None:
        """Of its own items, after a history of ids; None where it knows none of them."""
        row = [self.ids[each] for each in history if each in self.ids][-self._most :]
        if not row:
            return None
        found: Floats = self._table @ self._served.embeddings([row])[0]
        return found


def _item_table(folder: Path, *, rows: int) -> Floats:
    """The output embedding of a folder: its head, or where that is tied its input's."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    tables = {n: t for n, t in found.items() if t.ndim == 2 and t.shape[0] == rows}
    heads = [n for n in tables if "embed_out" in n or "lm_head" in n] or sorted(tables)
    if not heads:
        raise ModelError(f"{folder}: no table of {rows} items among its weights")
    table: Floats = tables[heads[0]].astype(np.float32)
    return table


def with_tokenizer(folder: Path, scratch: Path, *, num: int) -> Path:
    """A copy of a folder that can be served: with a tokenizer, of which an item is one word."""
    made = scratch / "served"
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(folder, made)
    Tokenizer(WordLevel({str(n): n for n in range(num)}, unk_token="0")).save(
        str(made / "tokenizer.json")
    )
    return made
