"""Object detection keeps the promise; transformers' own processor finds the same boxes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shoal.errors import ConfigError
from shoal.launch.pool import WorkerPool
from shoal.launch.summary import last_words
from shoal.prove.parity import prove
from tiny import Bench, largest_difference

RECIPE = """\
seed: 3
task: {{kind: object-detection, grid: 2}}
model:
  kind: config
  architecture: yolos
  hidden_size: 16
  intermediate_size: 32
  num_hidden_layers: 2
  num_attention_heads: 2
  image_size: [16, 16]
  num_channels: 1
  patch_size: 4
  initializer_range: 0.2
  hidden_dropout_prob: 0.1
data: {{source: {source}, packing: false, validation: {{fraction: 0.2}}, evaluation_samples: null}}
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


def write_scenes(folder: Path) -> Path:
    """60 noisy images of 16 x 16 pixels with one or two squares, tall or wide."""
    draw = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(60):
        pixels = draw.integers(0, 90, (16, 16), dtype=np.uint8)
        for column in range(draw.integers(1, 3)):
            tall = int(draw.integers(2))
            left, top = 8 * column + int(draw.integers(3)), int(draw.integers(9))
            width, height = (3, 7) if tall else (5, 3)
            pixels[top : top + height, left : left + width] = 220
            box = [left, top, width, height]
            annotations.append({"image_id": number, "category_id": tall, "bbox": box})
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png"})
    kinds = [{"id": 0, "name": "wide"}, {"id": 1, "name": "tall"}]
    path = folder / "squares.coco.json"
    tree = {"images": images, "annotations": annotations, "categories": kinds}
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory, pool: WorkerPool) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("squares"), pool=pool)
    bench.recipe.write_text(RECIPE.format(source=write_scenes(bench.folder)), encoding="utf-8")
    yield bench


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides", [("parallel.replicate=2",), ("parallel.shard=2",)], ids=" ".join
)
def test_one_loss_curve_in_any_layout(squares: Bench, overrides: tuple[str, ...]) -> None:
    one, other = squares.run(), squares.run(*overrides)
    assert largest_difference(other.losses, one.losses) < 1e-5
    last = [run.evaluations[-1] for run in (other, one)]
    assert last[0]["evaluation_loss"] == pytest.approx(last[1]["evaluation_loss"], rel=1e-5)
    assert last[0]["map"] == pytest.approx(last[1]["map"], abs=1e-3)


def test_a_resumed_run_is_the_straight_one(squares: Bench) -> None:
    straight = squares.run()
    resumed = squares.resume(
        squares.train("train.stop_after_steps=5"), "train.stop_after_steps=null"
    )
    assert resumed.losses == straight.losses
    assert resumed.evaluations[-1]["map"] == straight.evaluations[-1]["map"]


def test_a_layout_is_proven_and_opened_by_transformers(squares: Bench) -> None:
    found = prove(
        squares.recipe,
        ["parallel.shard=2", "model.hidden_dropout_prob=0.0"],
        out=squares.new_path(),
        pool=squares.pool,
        steps=2,
    )
    assert found.proven, str(found)
    assert found.largest["opened"][0] < 1e-5


def test_transformers_finds_the_boxes_that_the_picture_shows(squares: Bench) -> None:
    """With the exported folder, its processor and its own way from outputs to boxes."""
    import transformers

    run = squares.run("train.steps=150", "train.evaluate_every_steps=150")
    shown = json.loads((run.path / "shown.json").read_text())
    model = transformers.AutoModelForObjectDetection.from_pretrained(run.path / "model").eval()
    assert model.config.id2label == {0: "tall", 1: "wide"}
    number = 0
    for image, _, found in shown["images"]:
        pixels = torch.tensor(image)[None].float() / 127.5 - 1
        with torch.no_grad():
            made = model(pixel_values=pixels)
        chances = made.logits.softmax(-1)[0, :, :-1]
        scores, labels = chances.max(-1)
        middle, size = made.pred_boxes[0, :, :2], made.pred_boxes[0, :, 2:]
        boxes = torch.cat([middle - size / 2, middle + size / 2], dim=1) * 16
        sure = [n for n in range(len(scores)) if scores[n] >= 0.5]
        assert [each[4] for each in found] == [int(labels[n]) for n in sure]
        for box, n in zip(found, sure):
            assert np.allclose(box[:4], boxes[n], atol=0.02)
            assert box[5] == pytest.approx(float(scores[n]), abs=1e-4)
            number += 1
    assert number, "something was found"
    with Image.open(run.path / "boxes.png") as picture:
        assert picture.size[0] > 900
    summary = json.loads((run.path / "summary.json").read_text())
    words = "\n".join(last_words(run.path, summary, recipe="mine.yaml"))
    assert f"mAP@0.5: {summary['evaluation_before']['map']:.3f} before" in words
    assert f"nearest neighbours: {summary['baseline']['components_map']:.3f}" in words


def test_what_the_recipe_says_of_the_images_must_be_so(squares: Bench) -> None:
    with pytest.raises(ConfigError, match=r"(?s)image_size.*says \[32, 32\], but the data has"):
        squares.train("model.image_size=[32,32]")
