"""A task without tokens keeps the promise, and transformers finds the losses that shoal logs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shoal.data.stream import Evaluation
from shoal.errors import ConfigError, ModelError
from shoal.launch import pictures
from shoal.launch.pool import WorkerPool
from shoal.launch.summary import last_words
from shoal.observe.events import read_lines
from shoal.prove.parity import prove
from shoal.serve.generate import continue_prompt
from tiny import Bench, largest_difference

RECIPE = """\
seed: 3
task: {{kind: image-classification, shift_pixels: 1}}
model:
  kind: config
  architecture: vit
  hidden_size: 16
  intermediate_size: 32
  num_hidden_layers: 2
  num_attention_heads: 2
  image_size: 8
  num_channels: 1
  patch_size: 4
  hidden_dropout_prob: 0.1
data: {{source: {source}, packing: false, validation: {{fraction: 0.2}}, evaluation_samples: null}}
train:
  steps: 20
  global_batch_samples: 16
  evaluate_every_steps: 20
  optimizer: {{kind: adamw, learning_rate: 3.0e-3}}
parallel: {{replicate: 1}}
precision: {{compute: float32}}
checkpoint: {{every_steps: 10}}
launch: {{workers: processes, threads_per_worker: 1}}
"""


def write_images(folder: Path) -> Path:
    """Noisy images of 8 x 8 pixels that are brighter above (up), or below (down)."""
    random = np.random.default_rng(0)
    for name in ("up", "down"):
        (folder / name).mkdir(parents=True)
        for number in range(45):
            pixels = random.integers(0, 160, (8, 8), dtype=np.uint8)
            half = slice(0, 4) if name == "up" else slice(4, 8)
            pixels[half] += 60
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, pool: WorkerPool) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("images"), pool=pool)
    source = write_images(bench.folder / "halves")
    bench.recipe.write_text(RECIPE.format(source=source), encoding="utf-8")
    yield bench


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel.replicate=2", "launch.workers=threads"),
        ("parallel.replicate=2",),
        ("parallel.shard=2",),
        ("train.micro_batch_samples=2",),
    ],
    ids=" ".join,
)
def test_one_loss_curve_in_any_layout(images: Bench, overrides: tuple[str, ...]) -> None:
    """Shifts and dropout included: both are keyed by the sample."""
    one, other = images.run(), images.run(*overrides)
    assert largest_difference(other.losses, one.losses) < 1e-5
    last = [run.evaluations[-1]["evaluation_loss"] for run in (other, one)]
    assert last[0] == pytest.approx(last[1], rel=1e-5)


@pytest.mark.slow
def test_exact_mode_has_the_same_bits(images: Bench) -> None:
    found = [
        images.run("train.exact=true", "train.micro_batch_samples=4", *more).digits
        for more in ((), ("parallel.replicate=2", "launch.workers=threads"))
    ]
    assert found[0] == found[1]


def test_a_layout_is_proven(images: Bench) -> None:
    found = prove(
        images.recipe, ["parallel.shard=2"], out=images.new_path(), pool=images.pool, steps=2
    )
    assert found.proven, str(found)
    assert found.largest["loss"][0] < 1e-6


def test_transformers_finds_the_same_loss_with_the_exported_model(images: Bench) -> None:
    import transformers

    run = images.run()
    model = transformers.AutoModelForImageClassification.from_pretrained(run.path / "model")
    settings = json.loads((run.path / "model/preprocessor_config.json").read_text())
    assert settings["size"] == {"height": 8, "width": 8}
    total = right = 0.0
    rows = list(_evaluated(images))
    for row in rows:
        pixels = torch.from_numpy(row["pixel_values"]).float() * settings["rescale_factor"]
        pixels = (pixels - settings["image_mean"][0]) / settings["image_std"][0]
        found = model(pixel_values=pixels[None], labels=torch.tensor([int(row["labels"])]))
        total += float(found.loss.detach())
        right += int(found.logits.argmax()) == int(row["labels"])
    last = run.evaluations[-1]
    # the same weights in another batch size and attention: float32 rounding
    assert total / len(rows) == pytest.approx(last["evaluation_loss"], rel=1e-5)
    assert right / len(rows) == pytest.approx(last["accuracy"], abs=1e-9)
    assert model.config.id2label == {0: "down", 1: "up"}


def test_the_run_ends_with_its_accuracy_and_the_baseline(images: Bench) -> None:
    run = images.run()
    summary = json.loads((run.path / "summary.json").read_text())
    assert set(summary["baseline"]) == {"logistic_regression_accuracy", "logistic_regression_loss"}
    words = "\n".join(last_words(run.path, summary, recipe="mine.yaml"))
    accuracy = summary["evaluation"]["accuracy"]
    assert f"{accuracy:.3f} now; logistic regression on the pixels: " in words
    assert "images per second" in words and "YOUR-FOLDER" not in words, "it was their own data"
    assert not (run.path / "model/tokenizer.json").exists()


def test_the_picture_is_there_while_it_trains(
    images: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def draw(run: Path, kind: str) -> None:
        pictures.draw_picture(run, kind)
        assert (run / "confusion.png").is_file()
        drawn.append(len(read_lines(run / "metrics.jsonl")))

    monkeypatch.setattr(pictures, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(pictures.Pictures, "_draw", lambda made: draw(made._run, made._kind))
    run = images.train("train.evaluate_every_steps=5", "train.steps=40")
    assert drawn and drawn[0] < len(run.rows)


def test_the_picture_is_of_the_same_images_in_any_layout(images: Bench) -> None:
    """Confusion and misread images, against what transformers takes each image for."""
    import transformers

    one, other = images.run("train.steps=2"), images.run("train.steps=2", "parallel.replicate=2")
    shown = [json.loads((run.path / "shown.json").read_text()) for run in (one, other)]
    assert shown[0] == shown[1]
    model = transformers.AutoModelForImageClassification.from_pretrained(one.path / "model")
    confusion, misread = np.zeros((2, 2)), []
    for row in _evaluated(images):
        pixels = torch.from_numpy(row["pixel_values"]).float() / 127.5 - 1
        guess, label = int(model(pixels[None]).logits.argmax()), int(row["labels"])
        confusion[label, guess] += 1
        misread += [[row["pixel_values"].tolist(), label, guess]] if guess != label else []
    assert misread, "after two steps some are"
    assert shown[0]["confusion"] == confusion.tolist()
    assert shown[0]["misread"] == misread[:12]
    with Image.open(one.path / "confusion.png") as picture:
        assert picture.size[0] > 900
    summary = json.loads((one.path / "summary.json").read_text())
    assert f"picture: {one.path / 'confusion.png'}" in last_words(one.path, summary, recipe="a")


def test_what_the_recipe_says_of_the_images_must_be_so(images: Bench) -> None:
    with pytest.raises(ConfigError, match=r"(?s)image_size.*says 16, but the data has 8.*=null"):
        images.train("model.image_size=16")
    free = images.run("model.image_size=null", "model.num_channels=null")
    assert free.losses == images.run().losses


def test_a_model_of_images_goes_on_with_no_prompt(images: Bench) -> None:
    with pytest.raises(ModelError, match="it has no tokenizer, so it reads no text"):
        continue_prompt(images.run().path, prompt="a", tokens=1, temperature=0.0, seed=0)


def test_images_are_cut_along_no_axis_but_shard(images: Bench) -> None:
    with pytest.raises(ConfigError, match=r"(?s)a vit model cannot be cut along tensor.*shard=2"):
        images.train("parallel.tensor=2")


def _evaluated(images: Bench) -> Iterator[dict[str, np.ndarray]]:
    """The images that the run was scored on, as they were stored."""
    (folder,) = [
        path
        for path in (Path(os.environ["SHOAL_CACHE"]) / "prepared").glob("mixture-*")
        if "halves" in (path / "description.json").read_text()
    ]
    yield from Evaluation(folder, batch_samples=1).rows()
