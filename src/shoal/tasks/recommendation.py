"""What a user takes next: a causal transformer over items, beside and with neighbours in time.

Each user's last item is held out for the test and the one before for choices (validation); the
model learns the rest. All items are ranked but those that the user has seen.
Shapes: B users of a batch, T items of the longest history, V items, D hidden size; the two
questions of a user (validation, test) come in this order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.errors import DataError
from shoal.fields import IGNORED, TOKENS, Field, Fields
from shoal.tasks.neighbours import (
    AGES,
    DENSE_ITEMS,
    RANKED,
    Floats,
    History,
    Neighbours,
    cold_start,
    gain_of,
    linear_baselines,
    rank_of,
)
from shoal.tasks.pictures import OTHER, QUIET, STRONG, new_figure, save
from shoal.tasks.scores import Examples
from shoal.tasks.task import (
    NO_TOOLS,
    Batch,
    Curve,
    Evaluated,
    Named,
    Output,
    Record,
    Sample,
    Scores,
    Task,
    Tools,
    Vector,
    real_rows,
    token_specimens,
    was,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal.models.anatomy import Anatomy

FEWEST = 4
"""Items that a user must have: two are held out, and one is learned from another."""

WEIGHTS = tuple(number / 10 for number in range(11))
"""Of the transformer's scores in the sum with the neighbours'."""

_WAYS = [(age, weight) for age in range(len(AGES)) for weight in range(len(WEIGHTS))]
"""Ways to score: by which age, and with which weight."""

_SHOWN = 4  # users in the picture
_RESAMPLED = 2000  # samples of a bootstrap


class Recommendation(Task):
    """The next item of each user's history, by cross entropy over all items."""

    kind = "recommendation"
    auto_class = "AutoModelForCausalLM"
    runs_once = True
    causal = True
    needs_tokenizer = False
    target_name = "items"
    curve = Curve("nats per item")
    own_data = "YOUR.inter"
    picture = "recommended.png"

    def __init__(
        self, settings: Mapping[str, Any] | None = None, *, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(settings, options=options)
        self._items: list[str] = list(self.settings.get("items", []))
        self._numbers = {item: number for number, item in enumerate(self._items)}
        self._neighbours: Neighbours | None = None

    @property
    def fields(self) -> Fields:
        """The end of a history but for its last item, what follows each item, and the two held out.

        The last two labels are ignored: what follows there is held out. `history` is all of it,
        for scores: what was seen, and what neighbours say.
        """
        held_out = Field("int64", (2,), fill=IGNORED)
        return {**TOKENS, "held_out": held_out, "history": Field("int64", (None,), -1, "history")}

    def learn(self, records: Iterable[Record], *, tools: Tools = NO_TOOLS) -> dict[str, Any]:
        """`{"items": [ids], "texts": [what each is]}`, by id. Raises DataError: nothing to learn.

        Notes how many users have too few items.
        """
        texts: dict[str, str] = {}
        lengths: dict[str, int] = {}  # a source that is also evaluated on comes twice
        for number, record in enumerate(records):
            items = _items(record)
            texts.update(zip(items, record.get("texts") or [""] * len(items)))
            lengths[str(record.get("user", number))] = len(items)
        users, short = len(lengths), sum(length < FEWEST for length in lengths.values())
        if users == short:
            raise DataError(
                f"recommendation: none of {users} users has at least {FEWEST} items, and fewer "
                "leave nothing to learn from once two are held out\n    name a source with longer "
                "histories, or check its column user_id"
            )
        self._items = sorted(texts)
        self._numbers = {item: number for number, item in enumerate(self._items)}
        self.settings = {"items": self._items, "texts": [texts[item] for item in self._items]}
        self.notes = [f"{users - short:,} users, {len(texts):,} items"]
        if short:
            self.notes.append(f"{short:,} users with fewer than {FEWEST} items are left out")
        return self.settings

    def model_settings(self) -> dict[str, Any]:
        """An id for each item, and none for anything else."""
        none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        return {"vocab_size": max(1, len(self._items)), **none}

    def encode(self, records: Sequence[Record], *, tools: Tools) -> list[Sample]:
        """`{"user", "items": [oldest first]}` -> `input_ids`, `labels`, `held_out` and `history`.

        Of a longer history than `tools.sequence_tokens` the last items; of a user with too few
        items an empty sample. Raises DataError for an item that `learn` has not seen.
        """
        samples: list[Sample] = []
        for record in records:
            numbers = [self._number(item, record) for item in _items(record)]
            if len(numbers) < FEWEST:
                none: list[int] = []
                samples.append({"input_ids": none, "labels": none, "held_out": [0, 0]})
                samples[-1]["history"] = none
                continue
            shown = numbers[:-1][-(tools.sequence_tokens or len(numbers)) :]
            labels = [*shown[1:-1], IGNORED, IGNORED]
            samples.append({"input_ids": shown, "labels": labels, "held_out": numbers[-2:]})
            samples[-1]["history"] = numbers
        return samples

    def _number(self, item: str, record: Record) -> int:
        number = self._numbers.get(item)
        if number is None:
            raise DataError(
                f"recommendation: the item {item[:40]!r} of user {record.get('user')!r} is not "
                f"among the {len(self._items):,} known\n    let the task learn its items from all "
                "parts of the data"
            )
        return number

    def specimens(self, config: Any) -> list[Sample]:
        """Histories of unequal length."""
        samples = token_specimens(config)
        for sample in samples:
            ids = sample["input_ids"]
            sample["labels"] = np.append(ids[1:-1], [IGNORED, IGNORED])
            sample["held_out"] = ids[-1:].repeat(2)
            sample["history"] = np.append(ids, ids[-1])
        return samples

    def user_call(self, batch: Batch) -> dict[str, Tensor]:
        """transformers moves the labels itself: each item's stands where that item is."""
        call = super().user_call(batch)
        labels = call["labels"].roll(1, dims=1)
        labels[:, 0] = IGNORED
        return {**call, "labels": labels}

    def user_losses(self, made: Any, batch: Batch, *, evaluated: bool = False) -> tuple[float, int]:
        """Evaluated is the validation item, behind the item before the last."""
        if not evaluated:
            return super().user_losses(made, batch)
        labels = batch["labels"].new_full(batch["labels"].shape, IGNORED)
        labels[:, -2] = batch["held_out"][:, 0]
        return super().user_losses(made, {**batch, "labels": labels})

    def output(self, model: nn.Module, anatomy: Anatomy, batch: Batch, *, step: int = 0) -> Output:
        """Hidden states [B, T, D], labels [B, T]; for scores the items held out [B, 2]."""
        from shoal.models.anatomy import head_parameters, hidden_of, logits_of
        from shoal.tasks.losses import AtPlaces

        last = (batch["document_ids"] >= 0).sum(dim=1) - 1  # -1 of rows that only fill the batch
        places = (last[:, None] + last.new_tensor([-1, 0])).clamp(min=0)
        fields = {"labels": batch["labels"], "asked": batch["held_out"], "places": places}
        return Output(
            hidden=hidden_of(model, dict(batch), step=step),
            fields=fields,
            loss=AtPlaces(logits_of(model), head_parameters(model)),
        )

    def metrics(self) -> RankingMetrics:
        """Of the transformer alone."""
        return RankingMetrics(self.settings, neighbours=None)

    def metrics_on(self, data: Evaluated) -> RankingMetrics:
        """With neighbours counted in the training part, where the catalogue is small enough."""
        if self._neighbours is None and len(self._items) <= DENSE_ITEMS:
            found = [history_of(row) for row in data.training_rows()]
            self._neighbours = Neighbours(found, num_items=len(self._items))
        return RankingMetrics(self.settings, neighbours=self._neighbours)

    def baseline(self, data: Evaluated) -> Named:
        """NDCG@10 of popularity and linear models, and recall of items by their texts alone."""
        histories = [history_of(row) for row in data.training_rows()]
        texts = self.settings["texts"]
        cold = cold_start(histories, texts=texts) if len(texts) <= DENSE_ITEMS else {}
        return {**linear_baselines(histories, num_items=len(texts)), **cold}

    def words(self, before: Named | None, after: Named) -> list[str]:
        """NDCG@10 of the sum, of its parts and of simpler things; catalogue; new items."""
        beside = [f"popularity {after['popularity_ndcg']:.3f}"]
        if "ease_ndcg" in after:
            beside.append(f"EASE {after['ease_ndcg']:.3f}")
            beside.append(f"EASE on recent items {after['recent_ease_ndcg']:.3f}")
        alone = f"{was(before, 'transformer_ndcg', 3)}{after['transformer_ndcg']:.3f} now"
        if "neighbour_ndcg" not in after:
            lines = [f"NDCG@10: {alone} ({_interval(after)}); {', '.join(beside)}"]
        else:
            lines = [
                f"NDCG@10: {after['ndcg']:.3f} ({_interval(after)}) of transformer and neighbours "
                f"together, weight {after['weight']:.1f} (chosen on the validation item); "
                f"transformer alone {alone}, neighbours {after['neighbour_ndcg']:.3f}; "
                f"{', '.join(beside)}"
            ]
        lines.append(
            f"in somebody's ten best: {100 * after['catalogue_share']:.0f} % of all items; "
            f"the item itself: {100 * after['hit_rate']:.0f} % of the users"
        )
        if "cold_text_recall" in after:
            lines.append(
                f"items that nobody has taken yet, recall@10: {after['cold_text_recall']:.3f} by "
                f"their texts; popularity {after['cold_popularity_recall']:.3f}, chance "
                f"{after['cold_chance_recall']:.3f}"
            )
        return lines

    def files(self) -> dict[str, str]:
        """items.json: the item of each id of the model, and what it is."""
        pairs = zip(self._items, self.settings.get("texts", []))
        items = [{"item": item, "text": text} for item, text in pairs]
        return {"items.json": json.dumps(items, indent=0, ensure_ascii=False) + "\n"}

    def draw(self, shown: Mapping[str, Any], path: Path) -> None:
        """For some users: the last items they took, and the ten best with what they took next."""
        users = shown["users"]
        figure = new_figure(11, 0.6 + 2.6 * len(users))
        for axes, user in zip(figure.subplots(len(users), 1, squeeze=False)[:, 0], users):
            axes.set_axis_off()
            axes.set_xlim(0, 1), axes.set_ylim(11.5, -1.5)
            axes.text(0, -1, "took last", fontsize=9, color=QUIET)
            axes.text(0.5, -1, "ten best of all others", fontsize=9, color=QUIET)
            for line, text in enumerate(user["took"]):
                axes.text(0, line, text[:60], fontsize=8)
            for line, text in enumerate(user["best"]):
                is_next = text == user["next"]
                style = {"color": STRONG, "weight": "bold"} if is_next else {"color": "black"}
                axes.text(0.5, line, f"{line + 1}. {text[:60]}", fontsize=8, **style)
            if user["next"] not in user["best"]:
                axes.text(0.5, 10, f"took next: {user['next'][:60]}", fontsize=8, color=OTHER)
        save(figure, path)


@dataclass(frozen=True)
class _Question:
    """Of one user and one held-out item: ranks by each way, and the ten best of each [ways, 10]."""

    ranks: np.ndarray[Any, Any]
    best: np.ndarray[Any, Any]


class RankingMetrics:
    """Sums over users: the loss on the validation item, users, how often each way gave each place
    (0 to 9, and behind) on both items [2, ways, 11], and which items were among ten best."""

    needs_predictions = True

    def __init__(self, settings: Mapping[str, Any], *, neighbours: Neighbours | None) -> None:
        self._names = [text or item for item, text in zip(settings["items"], settings["texts"])]
        self._neighbours = neighbours
        self._ways = _WAYS if neighbours is not None else [(0, len(WEIGHTS) - 1)]
        self._sums = np.zeros(2)
        self._places = np.zeros((2, len(self._ways), RANKED + 1))
        self._listed = np.zeros((len(self._ways), len(self._names)))
        self._users = Examples(_SHOWN)

    def add(self, *, batch: Batch, scores: Scores) -> None:
        """Count users by `losses` [B, 2] and `predictions`: logits of all items [B, 2, V]."""
        assert scores.predictions is not None, "items are ranked by the logits"
        losses, logits = np.asarray(scores.losses.double()), np.asarray(scores.predictions.float())
        kept = np.flatnonzero(real_rows(batch))
        self._sums += [losses[kept, 0].sum(), len(kept)]
        for row in kept:
            history = history_of({name: np.asarray(each[row]) for name, each in batch.items()})
            for number, (seen, target) in enumerate(history.questions):
                found = self._ask(logits[row, number], seen, target)
                places = np.minimum(found.ranks, RANKED)
                self._places[number, np.arange(len(places)), places] += 1
            for way, best in enumerate(found.best):
                self._listed[way, best] += 1
            if self._users.wants(batch, int(row)):
                took = [int(item) for item in seen[-RANKED:]]
                self._users.keep(batch, int(row), [took, target, found.best.tolist()])

    def _ask(self, logits: Floats, seen: np.ndarray[Any, Any], target: int) -> _Question:
        scores = _standard(logits)[None]
        if self._neighbours is not None:
            near = _standard(self._neighbours.scores(seen))
            weights = np.array([WEIGHTS[w] for _, w in self._ways], dtype=np.float32)[:, None]
            scores = weights * scores + (1 - weights) * near[[age for age, _ in self._ways]]
        ranks = rank_of(scores, seen=seen, target=target)
        scores[:, seen] = -np.inf
        most = min(RANKED, scores.shape[1] - 1)
        best = np.argpartition(-scores, most, axis=1)[:, :most]
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
        return _Question(ranks, np.take_along_axis(best, order, axis=1))

    @property
    def examples(self) -> Sequence[Sequence[Any]]:
        """The first users: the last items they took, the next, the ten best of each way."""
        return self._users.found

    def vector(self) -> Vector:
        """[loss, users, places by item and way, lists by way and item]."""
        return np.concatenate([self._sums, self._places.ravel(), self._listed.ravel()])

    def _parts(self, vector: Vector) -> tuple[Vector, Vector, Vector]:
        first, second = 2, 2 + self._places.size
        return (
            vector[:first],
            vector[first:second].reshape(self._places.shape),
            vector[second:].reshape(self._listed.shape),
        )

    def _chosen(self, places: Vector, *, weights: Sequence[int]) -> int:
        """The way of these weights that is best on the validation item."""
        gains = places[0] @ gain_of(np.arange(RANKED + 1))
        allowed = [n for n, (_, weight) in enumerate(self._ways) if weight in weights]
        return max(allowed, key=lambda way: (gains[way], -way))

    def result(self, vector: Vector | None = None) -> Named:
        """Scores on the test item, by what is best on the validation item; the loss on that."""
        (loss, users), places, listed = self._parts(self.vector() if vector is None else vector)
        if not users:
            return {"evaluation_loss": math.nan, "evaluation_targets": 0.0}
        gains = places @ gain_of(np.arange(RANKED + 1)) / users  # [2, ways]
        shares = (listed > 0).mean(axis=1)
        whole = range(len(WEIGHTS))
        way, alone = self._chosen(places, weights=whole), self._chosen(places, weights=whole[-1:])
        low, high = bootstrap(places[1, way])
        found = {
            "evaluation_loss": float(loss / users),
            "ndcg": float(gains[1, way]),
            "ndcg_low": low,
            "ndcg_high": high,
            "hit_rate": float(places[1, way, :RANKED].sum() / users),
            "catalogue_share": float(shares[way]),
            "validation_ndcg": float(gains[0, way]),
            "weight": WEIGHTS[self._ways[way][1]],
            "age": AGES[self._ways[way][0]],
            "transformer_ndcg": float(gains[1, alone]),
            "transformer_validation_ndcg": float(gains[0, alone]),
            "transformer_share": float(shares[alone]),
        }
        if self._neighbours is not None:
            near = self._chosen(places, weights=whole[:1])
            found["neighbour_ndcg"] = float(gains[1, near])
            found["neighbour_share"] = float(shares[near])
        return {**found, "evaluation_targets": float(users)}

    def shown(self, vector: Vector, examples: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """The users of the picture by what their items are called, in the way that is chosen."""
        way = self._chosen(self._parts(vector)[1], weights=range(len(WEIGHTS)))
        name = self._names
        return {
            "users": [
                {
                    "took": [name[item] for item in took],
                    "next": name[target],
                    "best": [name[item] for item in best[way]],
                }
                for _, _, (took, target, best) in examples[:_SHOWN]
            ]
        }


def history_of(row: Mapping[str, Any]) -> History:
    """The history of a stored row."""
    items = np.asarray(row["history"], dtype=np.int64)
    return History(items[items >= 0])


def _standard(scores: Floats) -> Floats:
    """Scores [..., V] with mean 0 and deviation 1, so that those of two kinds can be added."""
    deviation = scores.std(axis=-1, keepdims=True)
    found: Floats = (scores - scores.mean(axis=-1, keepdims=True)) / np.maximum(deviation, 1e-9)
    return found


def bootstrap(places: Vector) -> tuple[float, float]:
    """95 % interval of NDCG@10 over users drawn anew, of how many had each place [11].

    A user's score depends on the place alone, so drawing users is drawing places.
    """
    users = int(places.sum())
    drawn = np.random.default_rng(0).multinomial(users, places / users, size=_RESAMPLED)
    low, high = np.quantile(drawn @ gain_of(np.arange(len(places))) / users, [0.025, 0.975])
    return float(low), float(high)


def _interval(after: Named) -> str:
    return f"95 % interval {after['ndcg_low']:.3f} to {after['ndcg_high']:.3f}"


def _items(record: Record) -> list[str]:
    items = record.get("items")
    if not isinstance(items, list) or not items:
        raise DataError(
            f"recommendation: expected a record with a list under 'items', got keys "
            f"{sorted(record)}\n    name a source of interactions (.inter: user_id, item_id, "
            "timestamp), or use another task.kind"
        )
    return [str(item) for item in items]
