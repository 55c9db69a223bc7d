"""Recommendation against transformers and against definitions written out in loops."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal.data import registry
from shoal.data.batch import stack
from shoal.data.interactions import read_interactions
from shoal.data.readers import reader_of
from shoal.errors import DataError
from shoal.models.anatomy import anatomy_of
from shoal.models.huggingface import build_meta, read_config
from shoal.models.init import materialise, record
from shoal.tasks import neighbours
from shoal.tasks.kinds import create
from shoal.tasks.neighbours import History, Neighbours, ease, gain_of, rank_of
from shoal.tasks.recommendation import Recommendation, bootstrap, history_of
from shoal.tasks.task import Scores, Tools

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def users(count: int = 12, *, items: int = 20, seed: int = 0) -> list[dict[str, Any]]:
    """Histories of 5 to 14 of so many items, no item twice."""
    draw = np.random.default_rng(seed)
    return [
        {
            "user": f"u{number}",
            "items": [f"i{n:02}" for n in draw.permutation(items)[: draw.integers(5, 15)]],
            "texts": [],
        }
        for number in range(count)
    ]


def task_of(records: list[dict[str, Any]]) -> Recommendation:
    task = Recommendation()
    task.learn(records)
    return task


def batch_of(task: Recommendation, records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    rows = []
    for sample in task.encode(records, tools=Tools()):
        count = len(sample["input_ids"])
        row = {name: np.asarray(each) for name, each in sample.items()}
        rows.append({**row, "position_ids": np.arange(count), "document_ids": np.zeros(count)})
    batch = {n: torch.from_numpy(a) for n, a in stack(rows, task.fields, lengths={}).items()}
    ids = torch.arange(len(records))
    return {**batch, "sample_ids": ids, "source_ids": torch.zeros_like(ids)}


def model_of(task: Recommendation) -> torch.nn.Module:
    settings = {**SMALL, **task.model_settings()}
    model = build_meta(
        read_config(architecture="gpt_neox", settings=settings), auto_class=task.auto_class
    )
    materialise(model, record=record(model), seed=0)
    return model.eval()


def histories(records: list[dict[str, Any]]) -> list[History]:
    return [History(np.array([int(item[1:]) for item in each["items"]])) for each in records]


# --- what is learned, and what is asked


def test_a_history_becomes_what_follows_each_item_but_the_two_held_out() -> None:
    records = users()
    task = task_of(records)
    sample = task.encode(
        [{"user": "a", "items": ["i03", "i01", "i02", "i07", "i05"]}], tools=Tools()
    )
    number = task.settings["items"].index
    assert sample == [
        {
            "input_ids": [number(i) for i in ("i03", "i01", "i02", "i07")],
            "labels": [number("i01"), number("i02"), -100, -100],
            "held_out": [number("i07"), number("i05")],
            "history": [number(i) for i in ("i03", "i01", "i02", "i07", "i05")],
        }
    ]
    (cut,) = task.encode(records[:1], tools=Tools(sequence_tokens=3))
    (whole,) = task.encode(records[:1], tools=Tools())
    assert cut["input_ids"] == whole["input_ids"][-3:] and cut["labels"] == whole["labels"][-3:]
    assert cut["held_out"] == whole["held_out"], "of a long history the last items"
    assert cut["history"] == whole["history"], "what was seen is known all the same"


def test_the_loss_is_transformers_own_on_each_history_alone() -> None:
    """Of the histories without their last two items, which nothing is learned from."""
    records = users()
    task = task_of(records)
    model, batch = model_of(task), batch_of(task, records)
    import transformers

    theirs = transformers.GPTNeoXForCausalLM(model.config)
    theirs.load_state_dict(model.state_dict())
    theirs.eval()
    total, validation = 0.0, []
    for sample in task.encode(records, tools=Tools()):
        seen = torch.tensor([sample["input_ids"][:-1]])
        total += float(theirs(seen, labels=seen).loss.detach()) * (seen.shape[1] - 1)
        scores = theirs(seen).logits[0, -1].detach().double().log_softmax(0)
        validation.append(-float(scores[sample["held_out"][0]]))
    output = task.output(model, anatomy_of(model), batch)
    assert task.count(batch) == sum(len(each["items"]) - 3 for each in records)
    # the same weights, padded and in another attention: float32 rounding
    assert float(output.total().detach()) == pytest.approx(total, rel=1e-5)
    metrics = task.metrics()
    metrics.add(batch=batch, scores=output.each(predict=True))
    assert metrics.result()["evaluation_loss"] == pytest.approx(np.mean(validation), rel=1e-5)


def test_nothing_that_is_held_out_is_learned_from() -> None:
    """Another validation or test item changes no gradient."""
    records = users()
    task = task_of(records)
    changed = [{**each, "items": [*each["items"][:-2], "i00", "i01"]} for each in records]
    found = []
    for data in (records, changed):
        model = model_of(task)
        task.output(model, anatomy_of(model), batch_of(task, data)).total().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-6), name


def test_rows_that_only_fill_a_batch_count_for_nothing() -> None:
    records = users(4)
    task = task_of(records)
    model, batch = model_of(task), batch_of(task, records)
    filled = {}
    for name, each in batch.items():
        fill = task.fields[name].fill if name in task.fields else -1 if name == "sample_ids" else 0
        row = torch.full((2, *each.shape[1:]), fill, dtype=each.dtype)
        filled[name] = torch.cat([each, row])
    found = []
    for each in (batch, filled):
        output, metrics = task.output(model, anatomy_of(model), each), task.metrics()
        metrics.add(batch=each, scores=output.each(predict=True))
        found.append((task.count(each), float(output.total().detach()), metrics.vector()))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    assert np.allclose(found[0][2], found[1][2])


# --- scores


def by_definition(scores: np.ndarray, *, seen: list[int], target: int) -> float:
    """DCG of the list without what was seen, over that of the ideal list (ten places)."""
    order = [item for item in np.argsort(-scores, kind="stable") if item not in seen][:10]
    relevance = [2.0 ** (item == target) - 1 for item in order]
    dcg = sum(r / math.log2(place + 2) for place, r in enumerate(relevance))
    return dcg / (1 / math.log2(2))


def test_ndcg_is_that_of_its_definition() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        scores = draw.normal(size=30)
        seen = draw.permutation(30)[:8].tolist()
        target = int(draw.choice([item for item in range(30) if item not in seen]))
        rank = rank_of(scores, seen=np.array(seen), target=target)
        wanted = by_definition(scores, seen=seen, target=target)
        assert float(gain_of(rank)) == pytest.approx(wanted)
    assert int(rank_of(np.zeros(11), seen=np.array([0]), target=5)) == 4, "in the middle of equals"
    assert gain_of(rank_of(np.ones(3), seen=np.array([1]), target=1)) == 0, "it was seen"


def test_neighbours_are_what_loops_count() -> None:
    data = histories(users())
    counts = np.zeros(20)
    near = np.zeros((20, 20))
    for history in data:
        items = history.items[:-2]
        for item in items:
            counts[item] += 1
        for (m, a), (n, b) in itertools.permutations(enumerate(items), 2):
            if abs(m - n) <= 10:
                near[a, b] += 1 / abs(m - n)
    wanted = near / (np.sqrt(np.outer(counts, counts)) + 10)
    found = Neighbours(data, num_items=20)
    assert np.allclose(found.similarity, wanted, rtol=1e-5)
    seen = data[0].items
    for age, scores in zip(neighbours.AGES, found.scores(seen)):
        by_hand = sum(
            math.exp(-after / age) * wanted[item] for after, item in enumerate(reversed(seen))
        )
        assert np.allclose(scores, by_hand, rtol=1e-4)


def test_ease_is_the_ridge_regression_of_each_item_by_the_others() -> None:
    data = histories(users(40))
    taken = np.zeros((40, 20))
    for row, history in enumerate(data):
        taken[row, history.trained] = 1
    found = ease(data, num_items=20, ridge=7.0)
    for item in range(20):
        others = np.delete(np.arange(20), item)
        x, y = taken[:, others], taken[:, item]
        wanted = np.linalg.solve(x.T @ x + 7.0 * np.eye(19), x.T @ y)
        assert np.allclose(found[others, item], wanted), item
        assert found[item, item] == 0


def test_scores_of_two_workers_add_up_and_the_way_is_chosen_on_the_validation_item() -> None:
    records = users(30)
    task = task_of(records)
    batch = batch_of(task, records)
    table = Neighbours([history_of(row) for row in rows_of(batch)], num_items=20)
    draw = np.random.default_rng(1)
    scores = Scores(torch.ones(30, 2), torch.from_numpy(draw.normal(size=(30, 2, 20))))
    # the transformer knows the validation item, and nothing of the test item
    scores.predictions[torch.arange(30), 0, batch["held_out"][:, 0]] = 20.0
    from shoal.tasks.recommendation import RankingMetrics

    whole = RankingMetrics(task.settings, neighbours=table)
    parts = [RankingMetrics(task.settings, neighbours=table) for _ in range(2)]
    whole.add(batch=batch, scores=scores)
    for part, rows in zip(parts, (slice(0, 13), slice(13, 30))):
        some = {name: each[rows] for name, each in batch.items()}
        part.add(batch=some, scores=Scores(scores.losses[rows], scores.predictions[rows]))
    summed = parts[0].vector() + parts[1].vector()
    found = whole.result()
    assert whole.result(summed) == found
    assert found["weight"] > 0 and found["validation_ndcg"] == 1.0
    assert found["transformer_validation_ndcg"] == 1.0
    gains = [
        by_definition(
            scores.predictions[row, 1].numpy(),
            seen=batch["input_ids"][row][batch["document_ids"][row] >= 0].tolist(),
            target=int(batch["held_out"][row, 1]),
        )
        for row in range(30)
    ]
    assert found["transformer_ndcg"] == pytest.approx(np.mean(gains))
    # the interval of any ranks against the normal one of the same mean
    places = np.bincount(draw.integers(0, 14, size=500).clip(max=10), minlength=11)
    each = np.repeat(gain_of(np.arange(11)), places)
    low, high = bootstrap(places.astype(float))
    assert high - low == pytest.approx(2 * 1.96 * each.std() / math.sqrt(500), rel=0.05)
    assert low < each.mean() < high
    assert sorted(parts[0].examples + parts[1].examples)[:4] == list(whole.examples)


def rows_of(batch: dict[str, torch.Tensor]) -> list[dict[str, np.ndarray]]:
    count = len(batch["sample_ids"])
    return [{name: each[row].numpy() for name, each in batch.items()} for row in range(count)]


def test_new_items_are_found_by_their_texts_where_texts_tell() -> None:
    """Users like one of four genres each; nobody is known to have taken a fifth of the items."""
    draw = np.random.default_rng(0)
    genres = np.arange(80) % 4
    texts = [f"film {n} genre{g}" for n, g in enumerate(genres)]
    data = [
        History(draw.permutation(np.flatnonzero(genres == user % 4))[:12]) for user in range(60)
    ]
    found = neighbours.cold_start(data, texts=texts)
    assert found["cold_text_recall"] > 0.95
    assert found["cold_popularity_recall"] < found["cold_text_recall"] - 0.2
    assert neighbours.cold_start(data, texts=[""] * 80) == {}, "nothing is said of the items"


# --- reading, and what is refused


def write(folder: Path, text: str, *, items: str = "") -> Path:
    path = folder / "mine.inter"
    path.write_text(text, encoding="utf-8")
    if items:
        (folder / "mine.item").write_text(items, encoding="utf-8")
    return path


def test_interactions_of_one_time_keep_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        "7\tc\t1\t20\n7\tz\t2\t10\n8\tc\t1\t5\n7\ta\t5\t20\n7\tb\t5\t10\n",
        items="item_id:token\ttitle:token_seq\tgenre:token_seq\nc\tAlien\tHorror Sci-Fi\n",
    )
    assert reader_of(path) is read_interactions
    found = list(read_interactions(path))
    assert found == [
        {"user": "7", "items": ["z", "b", "c", "a"], "texts": ["", "", "Alien Horror Sci-Fi", ""]},
        {"user": "8", "items": ["c"], "texts": ["Alien Horror Sci-Fi"]},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user_id\titem\ttimestamp\n", r"line 1: expected columns .*item_id.*item, timestamp"),
        ("user_id\titem_id\ttimestamp\n1\t2\n", "line 2: expected 3 cells parted by tabs, got 2"),
        ("user_id\titem_id\ttimestamp\n1\t2\tnoon\n", "line 2: expected a number .* got 'noon'"),
        ("user_id\titem_id\ttimestamp\n1\t2\tnan\n", "line 2: expected a number .* got 'nan'"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_interactions(write(tmp_path, text)))


def test_users_with_one_interaction_are_left_out_and_counted() -> None:
    records = [*users(), {"user": "x", "items": ["i00"]}, {"user": "y", "items": ["i01"]}]
    task = task_of(records)
    assert task.notes == ["12 users, 20 items", "2 users with fewer than 4 items are left out"]
    assert task.encode(records[-1:], tools=Tools())[0]["input_ids"] == []
    with pytest.raises(DataError, match=r"none of 2 users has at least 4 items.*\n.*user_id"):
        Recommendation().learn(records[-2:])


def test_what_is_no_history_is_refused() -> None:
    task = task_of(users())
    with pytest.raises(DataError, match="the item 'new' of user 'a' is not among the 20 known"):
        task.encode([{"user": "a", "items": ["i01", "i02", "new", "i03"]}], tools=Tools())
    with pytest.raises(DataError, match="expected a record with a list under 'items', got keys"):
        task.encode([{"text": "a"}], tools=Tools())


def test_the_terms_are_told_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def fetched(**_: Any) -> None:
        told.append("fetched")

    monkeypatch.setattr(registry.fetch, "fetch", fetched)
    monkeypatch.setattr(registry.fetch, "problem", lambda *_, **__: "not there")
    registry.get("movielens", announce=told.append)
    assert "GroupLens terms: for research, not for commercial use" in told[0]
    assert told[1] == "fetched"


def test_what_was_learned_makes_the_same_task_again() -> None:
    task = task_of(users())
    again = create("recommendation", settings=task.settings)
    assert again.encode(users(), tools=Tools()) == task.encode(users(), tools=Tools())
    assert '"item": "i03"' in again.files()["items.json"]
