"""Recommendation keeps the promise; its table of items is sharded; a run ends with its scores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shoal.checkpoint.manifest import Manifest
from shoal.checkpoint.store import Store
from shoal.launch.pool import WorkerPool
from shoal.launch.summary import last_words
from shoal.prove.parity import prove
from tiny import Bench, largest_difference

RECIPE = """\
seed: 3
task: {{kind: recommendation}}
model:
  kind: config
  architecture: gpt_neox
  hidden_size: 16
  intermediate_size: 32
  num_hidden_layers: 2
  num_attention_heads: 2
  tie_word_embeddings: true
  hidden_dropout: 0.2
data:
  source: {source}
  sequence_tokens: 16
  packing: false
  validation: {{source: {source}}}
  evaluation_samples: null
train:
  steps: 10
  global_batch_samples: 16
  evaluate_every_steps: 10
  optimizer: {{kind: adamw, learning_rate: 3.0e-3}}
parallel: {{replicate: 1}}
precision: {{compute: float32}}
checkpoint: {{every_steps: 5}}
launch: {{workers: processes, threads_per_worker: 1}}
"""


def write_interactions(folder: Path) -> Path:
    """40 users who go through 30 items in steps of one to three, with two to a moment."""
    draw = np.random.default_rng(0)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(40):
        taken = draw.integers(30) + np.cumsum(draw.integers(1, 3, size=draw.integers(6, 15)))
        lines += [f"u{user}\tfilm-{item % 30}\t{n // 2}" for n, item in enumerate(taken)]
    (folder / "steps.item").write_text(
        "item_id:token\ttitle:token\n"
        + "".join(f"film-{n}\tFilm {n} {'odd' if n % 2 else 'even'}\n" for n in range(30)),
        encoding="utf-8",
    )
    path = folder / "steps.inter"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory, pool: WorkerPool) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("films"), pool=pool)
    source = write_interactions(bench.folder)
    bench.recipe.write_text(RECIPE.format(source=source), encoding="utf-8")
    yield bench


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [("parallel.replicate=2",), ("parallel.shard=2",)], ids=" ".join
)
def test_one_loss_curve_in_any_layout(films: Bench, overrides: tuple[str, ...]) -> None:
    one, other = films.run(), films.run(*overrides)
    assert largest_difference(other.losses, one.losses) < 1e-5
    last = [run.evaluations[-1] for run in (other, one)]
    assert last[0]["evaluation_loss"] == pytest.approx(last[1]["evaluation_loss"], rel=1e-5)
    assert last[0]["ndcg"] == pytest.approx(last[1]["ndcg"], rel=1e-5)
    shown = [json.loads((run.path / "shown.json").read_text()) for run in (other, one)]
    assert shown[0] == shown[1]


def test_a_resumed_run_is_the_straight_one(films: Bench) -> None:
    straight = films.run()
    resumed = films.resume(films.train("train.stop_after_steps=5"), "train.stop_after_steps=null")
    assert resumed.losses == straight.losses
    assert resumed.evaluations[-1]["ndcg"] == straight.evaluations[-1]["ndcg"]


def test_the_table_of_items_is_sharded(films: Bench) -> None:
    """Each of two workers holds, and saves, half of its rows."""
    run = films.run("parallel.shard=2")
    for kind in ("parameter", "exp_avg"):
        boxes = {
            (entry.box.offsets, entry.box.sizes)
            for entry in Manifest.read(Store(run.path / "checkpoints").path(10)).part.entries
            if "embed_in" in entry.name and entry.kind == kind
        }
        assert boxes == {((0, 0), (15, 16)), ((15, 0), (15, 16))}, kind


def test_a_layout_is_proven_and_opened_by_transformers(films: Bench) -> None:
    found = prove(
        films.recipe, ["parallel.shard=2"], out=films.new_path(), pool=films.pool, steps=2
    )
    assert found.proven, str(found)


def test_the_run_ends_with_its_scores_and_simpler_ones(films: Bench) -> None:
    run = films.run()
    summary = json.loads((run.path / "summary.json").read_text())
    assert set(summary["baseline"]) == {
        *("popularity_ndcg", "ease_ndcg", "recent_ease_ndcg"),
        *("cold_text_recall", "cold_popularity_recall", "cold_chance_recall"),
    }
    words = "\n".join(last_words(run.path, summary, recipe="mine.yaml"))
    assert f"{summary['evaluation']['neighbour_ndcg']:.3f}; popularity" in words
    assert "95 % interval" in words and "items that nobody has taken yet" in words
    with Image.open(run.path / "recommended.png") as picture:
        assert picture.size[0] > 900
    items = json.loads((run.path / "model/items.json").read_text())
    assert len(items) == 30 and items[0] == {"item": "film-0", "text": "Film 0 even"}
