"""Image classification against transformers, torch and plain sums; its readers and refusals."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional

from shoal.errors import DataError, ModelError
from shoal.models.anatomy import anatomy_of
from shoal.models.huggingface import build_meta, read_config
from shoal.models.init import materialise, record
from shoal.tasks.baselines import Labelled, logistic_regression
from shoal.tasks.image_classification import ImageClassification, shifted
from shoal.tasks.kinds import create
from shoal.tasks.losses import Summed
from shoal.tasks.scores import ClassMetrics, Examples
from shoal.tasks.task import Scores, Tools

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "patch_size": 4,
}


def records(count: int = 6, *, side: int = 8) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [
        {"image": random.integers(0, 256, (1, side, side), dtype=np.uint8), "label": "abc"[n % 3]}
        for n in range(count)
    ]


def task_of(**options: Any) -> ImageClassification:
    task = ImageClassification(options=options)
    task.learn(records())
    return task


def model_of(task: ImageClassification) -> torch.nn.Module:
    config = read_config(architecture="vit", settings={**SMALL, **task.model_settings()})
    model = build_meta(config, auto_class=task.auto_class)
    materialise(model, record=record(model), seed=0)
    return model


def batch_of(task: ImageClassification) -> dict[str, torch.Tensor]:
    samples = task.encode(records(), tools=Tools())
    return {
        "pixel_values": torch.from_numpy(np.stack([each["pixel_values"] for each in samples])),
        "labels": torch.tensor([each["labels"] for each in samples]),
        "sample_ids": torch.arange(len(samples)),
        "source_ids": torch.zeros(len(samples), dtype=torch.long),
    }


def test_classes_and_size_are_learned_and_kept() -> None:
    task = task_of()
    assert task.settings == {"classes": ["a", "b", "c"], "shape": [1, 8, 8]}
    again = create("image-classification", settings=task.settings)
    assert again.model_settings() == {
        "image_size": 8,
        "num_channels": 1,
        "num_labels": 3,
        "id2label": {0: "a", 1: "b", 2: "c"},
        "label2id": {"a": 0, "b": 1, "c": 2},
    }
    assert again.fields["pixel_values"].dims == (1, 8, 8)
    assert again.config_keys()["architectures"] == ["ForImageClassification"]


def test_the_loss_and_its_gradients_are_those_of_transformers() -> None:
    task = task_of()
    ours, theirs = model_of(task), model_of(task)
    batch = batch_of(task)
    output = task.output(ours, anatomy_of(ours), batch)
    assert isinstance(output.loss, Summed) and output.hidden.shape == (6, 16)
    (output.total() / task.count(batch)).backward()
    theirs.set_attn_implementation("eager")  # its own attention, not ours
    pixels = (batch["pixel_values"].float() / 255 - 0.5) / 0.5
    wanted = theirs(pixel_values=pixels, labels=batch["labels"])
    wanted.loss.backward()
    scores = output.each(predict=True)
    assert float(scores.losses.mean()) == pytest.approx(float(wanted.loss.detach()), rel=1e-5)
    assert torch.equal(scores.predictions, wanted.logits.argmax(dim=1))
    gradients = {name: each.grad for name, each in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        # float32 sums in another order: some 1e-6 of the largest element
        difference = (parameter.grad - gradients[name]).abs().max()
        assert difference <= 1e-5 * max(gradients[name].abs().max(), 1e-3), name


def test_rows_that_only_fill_a_batch_count_for_nothing() -> None:
    task = task_of()
    model, batch = model_of(task), batch_of(task)
    batch["labels"][4:], batch["sample_ids"][4:] = -100, -1
    assert task.count(batch) == 4
    few = {name: each[:4] for name, each in batch.items()}
    totals = [task.output(model, anatomy_of(model), each).total() for each in (batch, few)]
    assert float(totals[0].detach()) == pytest.approx(float(totals[1].detach()), rel=1e-6)
    metrics = task.metrics()
    scores = Scores(torch.ones(6), torch.tensor([0, 1, 2, 1, 0, 0]))
    metrics.add(batch=batch, scores=scores)
    assert metrics.result()["evaluation_targets"] == 4 and metrics.result()["accuracy"] == 0.75


def test_scores_by_hand_and_added_over_ranks() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2])
    guesses = torch.tensor([0, 1, 1, 1, 0])
    whole, parts = ClassMetrics(4), [ClassMetrics(4) for _ in range(2)]
    losses = torch.arange(5.0)
    whole.add(batch={"labels": labels}, scores=Scores(losses, guesses))
    for part, (start, stop) in zip(parts, pairwise([0, 2, 5])):
        cut = slice(start, stop)
        part.add(batch={"labels": labels[cut]}, scores=Scores(losses[cut], guesses[cut]))
    assert whole.result(parts[0].vector() + parts[1].vector()) == whole.result()
    # F1 of a: 2/(2+2), of b: 4/(2+3), of c: 0; d is nowhere
    assert whole.result() == {
        "evaluation_loss": 2.0,
        "accuracy": 0.6,
        "macro_f1": pytest.approx((0.5 + 0.8 + 0.0) / 3),
        "evaluation_targets": 5.0,
    }
    assert math.isnan(ClassMetrics(2).result()["accuracy"])


def test_shifts_move_an_image_and_depend_on_the_sample_alone() -> None:
    images = torch.arange(1, 51, dtype=torch.uint8).view(2, 1, 5, 5)
    ids = torch.tensor([7, 8])
    moved = shifted(images, ids, most=2)
    assert torch.equal(moved, shifted(images, ids, most=2))
    for row in range(2):
        alone = shifted(images[row : row + 1], ids[row : row + 1], most=2)
        assert torch.equal(alone[0], moved[row])
        padded = functional.pad(images[row, 0], (2, 2, 2, 2))
        places = [padded[y : y + 5, x : x + 5] for y in range(5) for x in range(5)]
        assert sum(torch.equal(moved[row, 0], place) for place in places) == 1
    many = shifted(images[:1].expand(4000, -1, -1, -1), torch.arange(4000), most=2)
    counts = torch.unique(many, dim=0, return_counts=True)[1]
    # 25 places of 160 each: chance moves a count by 12.4, so 62 is five times that
    assert len(counts) == 25 and (counts - 160).abs().max() < 62


def test_images_are_shifted_in_training_only() -> None:
    task, plain = task_of(shift_pixels=2), task_of()
    model, batch = model_of(task), batch_of(task)
    anatomy = anatomy_of(model)
    losses = {}
    for mode in (True, False):
        model.train(mode)
        outputs = [each.output(model, anatomy, batch) for each in (task, plain)]
        losses[mode] = [float(each.total().detach()) for each in outputs]
    assert losses[False][0] == losses[False][1]
    assert losses[True][0] != losses[True][1]


def test_the_baseline_is_at_the_optimum_of_scikit_learns_objective() -> None:
    """Its gradient by torch's autograd vanishes there: sum of cross entropies + |W|^2 / 2."""
    random = np.random.default_rng(1)
    inputs = random.normal(size=(200, 5)).astype(np.float32)
    labels = (inputs @ random.normal(size=(5, 3)) + 0.3).argmax(axis=1)
    train = Labelled(inputs, labels)
    accuracy, loss, _ = logistic_regression(train, scored=train, num_classes=3, steps=500)
    weight = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.05)
    x, y = torch.from_numpy(inputs).double(), torch.from_numpy(labels)
    for _ in range(1500):  # another method, another precision
        optimizer.zero_grad()
        logits = x @ weight.T + bias
        (
            functional.cross_entropy(logits, y, reduction="sum") + weight.square().sum() / 2
        ).backward()
        optimizer.step()
    logits = x @ weight.T + bias
    assert loss == pytest.approx(float(functional.cross_entropy(logits, y).detach()), rel=1e-3)
    assert accuracy == pytest.approx(float((logits.argmax(1) == y).double().mean()), abs=0.011)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"label": "d"}, "the class 'd' is not among the 3 known: a, b, c"),
        ({"label": 3}, r"a name under 'label', got keys \['image', 'label'\]"),
        (
            {"image": np.zeros((8, 8), dtype=np.uint8)},
            r"array of bytes \[channels, height, width\]",
        ),
        ({"image": np.zeros((1, 8, 8))}, r"array of bytes \[channels, height, width\]"),
    ],
)
def test_bad_records_are_refused(changed: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        task_of().encode([{**records(1)[0], **changed}], tools=Tools())


def test_images_of_two_sizes_or_not_square_are_refused() -> None:
    with pytest.raises(DataError, match=r"image 2 has the shape \(1, 4, 4\), those before it"):
        ImageClassification().learn([*records(1), *records(1, side=4)])
    wide = {"image": np.zeros((1, 4, 6), dtype=np.uint8), "label": "a"}
    task = ImageClassification()
    task.learn([wide])
    with pytest.raises(DataError, match=r"expected square images, got 4 x 6"):
        task.model_settings()


def test_pixels_that_no_patch_covers_are_refused() -> None:
    task = task_of()
    config = read_config(
        architecture="vit", settings={**SMALL, "patch_size": 3, **task.model_settings()}
    )
    model = build_meta(config, auto_class=task.auto_class)
    with pytest.raises(ModelError, match="image_size 8 is no multiple of patch_size 3"):
        task.output(model, anatomy_of(model), batch_of(task))


def test_the_last_words_have_the_baseline_beside() -> None:
    after = {"accuracy": 0.96, "logistic_regression_accuracy": 0.9}
    assert task_of().words({"accuracy": 0.1}, after) == [
        "accuracy: 0.100 before, 0.960 now; logistic regression on the pixels: 0.900"
    ]


def test_examples_are_those_with_the_smallest_ids() -> None:
    """Whatever the order they come in; rows that only fill a batch are none."""
    draw = np.random.default_rng(0)
    ids = draw.permutation(np.r_[np.arange(20), [-1, -1]])
    kept = Examples(5)
    for part in np.split(ids, 2):
        batch = {"sample_ids": part, "source_ids": np.zeros_like(part)}
        for row, sample in enumerate(part):
            if kept.wants(batch, row):
                kept.keep(batch, row, f"image {sample}")
    assert kept.found == [(0, n, f"image {n}") for n in range(5)]


def test_all_images_read_right_are_a_picture_too(tmp_path: Path) -> None:
    task = task_of()
    names = ["a long name", "b", "c"]
    task.draw({"names": names, "confusion": np.eye(3).tolist(), "misread": []}, tmp_path / "x.png")
    wrong = [[np.zeros((3, 4, 4)).tolist(), 0, 1]]
    task.draw(
        {"names": names, "confusion": np.eye(3).tolist(), "misread": wrong}, tmp_path / "y.png"
    )
    assert (tmp_path / "x.png").stat().st_size > 1000 < (tmp_path / "y.png").stat().st_size
