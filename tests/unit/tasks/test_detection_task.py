"""Object detection against transformers, and its scores against definitions in loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shoal.data.images import read_coco
from shoal.data.readers import reader_of
from shoal.data.scenes import overlap, read_scenes
from shoal.errors import DataError
from shoal.models.anatomy import anatomy_of
from shoal.models.huggingface import build_meta, read_config
from shoal.models.init import materialise, record
from shoal.tasks.boxes import average_precision, corners, intersection_over_union, right_ones
from shoal.tasks.components import components
from shoal.tasks.kinds import create
from shoal.tasks.object_detection import DetectionCounts, ObjectDetection, cells_of
from shoal.tasks.task import Tools

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "patch_size": 4,
}


def records(count: int = 6, *, side: int = 16) -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    return [
        {
            "image": draw.integers(0, 256, (1, side, side), dtype=np.uint8),
            "boxes": [[1, 2, 7, 6], [8, 9, 15.5, 16]][: 1 + number % 2],
            "labels": ["cat", "dog"][: 1 + number % 2],
        }
        for number in range(count)
    ]


def task_of(data: list[dict[str, Any]] | None = None, *, grid: int = 2) -> ObjectDetection:
    task = ObjectDetection(options={"grid": grid})
    task.learn(data or records())
    return task


def model_of(task: ObjectDetection, **more: Any) -> torch.nn.Module:
    settings = {**SMALL, **task.model_settings(), **more}
    model = build_meta(
        read_config(architecture="yolos", settings=settings), auto_class=task.auto_class
    )
    materialise(model, record=record(model), seed=0)
    return model.eval()


def batch_of(task: ObjectDetection) -> dict[str, torch.Tensor]:
    samples = task.encode(records(), tools=Tools())
    batch = {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}
    ids = torch.arange(len(samples))
    return {**batch, "sample_ids": ids, "source_ids": torch.zeros_like(ids)}


# --- the loss


def test_boxes_become_one_row_for_each_cell() -> None:
    task = task_of()
    (sample,) = task.encode(records()[1:2], tools=Tools())
    assert sample["labels"].tolist() == [0, 2, 2, 1], "cat in the first cell, dog in the last"
    wanted = [[4 / 16, 4 / 16, 6 / 16, 4 / 16], [11.75 / 16, 12.5 / 16, 7.5 / 16, 7 / 16]]
    assert np.allclose(sample["boxes"][[0, 3]], wanted)
    shares = np.array([[0.1, 0.1, 0.1, 0.1], [0.2, 0.2, 0.1, 0.1], [1.0, 0.6, 0.1, 0.1]])
    assert cells_of(shares, grid=2) == [0, None, 3]


def test_the_loss_is_of_what_transformers_gives_its_users() -> None:
    """Written out in float64 over cells, of the logits and boxes of transformers' own model."""
    import transformers

    task = task_of()
    model, batch = model_of(task), batch_of(task)
    theirs = transformers.YolosForObjectDetection(model.config)
    theirs.load_state_dict(model.state_dict())
    made = theirs.eval()(pixel_values=batch["pixel_values"].float() / 127.5 - 1)
    logits = made.logits.detach().double().numpy()
    boxes = made.pred_boxes.detach().double().numpy()
    total = 0.0
    for image in range(len(logits)):
        for cell in range(4):
            label = int(batch["labels"][image, cell])
            row = logits[image, cell]
            total += (np.log(np.exp(row).sum()) - row[label]) * (0.2 if label == 2 else 1.0)
            if label != 2:
                one, other = boxes[image, cell], batch["boxes"][image, cell].double().numpy()
                total += 5 * np.abs(one - other).sum() + 2 * (1 - generalised(one, other))
    output = task.output(model, anatomy_of(model), batch)
    # the same weights in another attention: float32 rounding
    assert float(output.total().detach()) == pytest.approx(total, rel=1e-5)
    assert task.count(batch) == 9
    with torch.no_grad():
        losses, count = task.user_losses(made, batch)
    assert losses == pytest.approx(total, rel=1e-5) and count == 9
    output.total().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def generalised(one: np.ndarray, other: np.ndarray) -> float:
    """GIoU of two boxes, as its paper has it."""
    (a, b), (c, d) = corners(one).reshape(2, 2), corners(other).reshape(2, 2)
    shared = float(np.prod(np.maximum(np.minimum(b, d) - np.maximum(a, c), 0)))
    union = float(np.prod(b - a) + np.prod(d - c)) - shared
    around = float(np.prod(np.maximum(b, d) - np.minimum(a, c)))
    return shared / union - (around - union) / around


def test_a_model_from_nothing_tells_its_places_apart() -> None:
    """transformers' class begins with zeros; a token begins nearest to what is around its cell."""
    task = task_of(records(side=32), grid=2)
    model = model_of(task, hidden_size=64)
    places = model.get_parameter("vit.embeddings.position_embeddings")[0].detach()
    patches, cells = places[1:65], places[65:]
    nearest = torch.cdist(cells, patches).topk(4, largest=False).indices
    around = {0: 9, 1: 13, 2: 41, 3: 45}
    for cell, corner in around.items():
        assert set(nearest[cell].tolist()) == {corner + near for near in (0, 1, 8, 9)}
    assert float(model.get_parameter("vit.embeddings.detection_tokens").detach().std()) > 0.01


def test_rows_that_only_fill_a_batch_count_for_nothing() -> None:
    task = task_of()
    model, batch = model_of(task), batch_of(task)
    filled = {}
    for name, each in batch.items():
        fill = task.fields[name].fill if name in task.fields else -1 if name == "sample_ids" else 0
        filled[name] = torch.cat([each, torch.full((2, *each.shape[1:]), fill, dtype=each.dtype)])
    found = []
    for each in (batch, filled):
        output, metrics = task.output(model, anatomy_of(model), each), task.metrics()
        metrics.add(batch=each, scores=output.each(predict=True))
        found.append((task.count(each), float(output.total().detach()), metrics.vector()))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    assert np.allclose(found[0][2], found[1][2])


# --- scores


def test_overlap_of_boxes_is_that_of_their_pixels() -> None:
    draw = np.random.default_rng(0)
    low = draw.integers(0, 20, size=(30, 2))
    boxes = np.concatenate([low, low + draw.integers(1, 12, size=(30, 2))], axis=1).astype(float)
    masks = np.zeros((30, 32, 32), dtype=bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int)):
        mask[top:bottom, left:right] = True
    wanted = [[(a & b).sum() / (a | b).sum() for b in masks] for a in masks]
    assert np.allclose(intersection_over_union(boxes, boxes), wanted)


def test_average_precision_is_that_of_a_sorted_list() -> None:
    """Of exact confidences, one by one, where the product counts by steps of 0.0005."""
    draw = np.random.default_rng(0)
    counts, listed, totals = DetectionCounts(3), [[] for _ in range(3)], np.zeros(3)
    for _ in range(60):
        low = draw.uniform(0, 40, size=(3, 2))
        boxes = np.concatenate([low, low + draw.uniform(8, 20, size=(3, 2))], axis=1)
        labels = draw.integers(3, size=3)
        found = np.concatenate([boxes + draw.normal(0, 2, boxes.shape), boxes + 15])
        chances = draw.dirichlet(np.ones(3), size=6)
        chances[np.arange(3), labels] += 0.5
        chances /= chances.sum(axis=1, keepdims=True)
        counts.add(chances, found, boxes=boxes, labels=labels)
        free = list(range(3))
        for n in sorted(range(6), key=lambda n: -chances[n].max()):
            overlaps = {
                m: intersection_over_union(found[n : n + 1], boxes[m : m + 1])[0, 0]
                for m in free
                if labels[m] == chances[n].argmax()
            }
            best = max(overlaps, key=overlaps.__getitem__, default=None)
            right = best is not None and overlaps[best] >= 0.5
            if right:
                free.remove(best)
            listed[chances[n].argmax()].append((chances[n].max(), right))
        totals += np.bincount(labels, minlength=3)
    wanted = []
    for rows, total in zip(listed, totals):
        hits = np.array([right for _, right in sorted(rows, key=lambda each: -each[0])])
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        wanted.append(sum(precision[n:].max() for n in np.flatnonzero(hits)) / total)
    assert counts.mean_average_precision() == pytest.approx(np.mean(wanted), abs=1e-3)
    assert 0.2 < np.mean(wanted) < 0.95, "not the trivial case"


def test_each_true_box_is_found_once() -> None:
    box = np.array([[0.0, 0.0, 10.0, 10.0]])
    found, scores = np.repeat(box, 3, axis=0), np.array([0.5, 0.9, 0.7])
    classes = np.zeros(3, dtype=int)
    right = right_ones(found, classes, scores, boxes=box, labels=np.array([0]))
    assert right.tolist() == [False, True, False], "the surest"
    none = right_ones(found, classes, scores, boxes=box[:0], labels=np.zeros(0, dtype=int))
    assert not none.any()
    assert np.isnan(average_precision(np.zeros(4), np.ones(4), total=0))
    assert average_precision(np.array([0, 1.0]), np.array([1.0, 0]), total=1) == 1


def test_components_hang_together_by_corners_too() -> None:
    mask = np.array([[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1]], dtype=bool)
    assert [part.tolist() for part in components(mask)] == [[[0, 0], [1, 1]], [[1, 3], [2, 3]]]


# --- reading, and what is refused


def test_scenes_are_the_same_each_time_and_held_out_ones_are_of_other_digits(
    tmp_path: Path,
) -> None:
    import gzip

    draw = np.random.default_rng(0)
    path = tmp_path / "digits.csv.gz"
    with gzip.open(path, "wt") as file:
        for number in range(20):
            image = np.zeros((28, 28), dtype=int)
            image[5:23, 8:20] = draw.integers(100, 255, (18, 12))
            held_out = number % 5 == 0
            file.write(",".join(map(str, [*image.ravel(), 1 if held_out else 0])) + "\n")
    found = [list(read_scenes(path, count=8, held_out=flag)) for flag in (False, True, False)]
    assert {label for scene in found[0] for label in scene["labels"]} == {"0"}
    assert {label for scene in found[1] for label in scene["labels"]} == {"1"}
    for one, other in zip(found[0], found[2], strict=True):
        assert np.array_equal(one["image"], other["image"]) and one["boxes"] == other["boxes"]
    for scene in found[0]:
        assert 1 <= len(scene["boxes"]) <= 4 and scene["image"].shape == (1, 64, 64)
        for n, box in enumerate(scene["boxes"]):
            assert all(overlap(box, other) <= 0.25 for other in scene["boxes"][:n])
            inside = scene["image"][0, box[1] : box[3], box[0] : box[2]].mean()
            assert inside > np.median(scene["image"]), "there is ink in it"


def write_coco(folder: Path, **changed: Any) -> Path:
    Image.fromarray(np.full((12, 10), 7, dtype=np.uint8)).save(folder / "a.png")
    tree = {
        "images": [{"id": 5, "file_name": "a.png"}],
        "annotations": [{"image_id": 5, "category_id": 3, "bbox": [1, 2, 4, 5]}],
        "categories": [{"id": 3, "name": "cat"}],
        **changed,
    }
    path = folder / "mine.coco.json"
    path.write_text(json.dumps(tree))
    return path


def test_annotations_of_coco_are_read(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    assert reader_of(path) is read_coco
    (found,) = read_coco(path)
    assert found["image"].shape == (1, 12, 10) and found["name"] == "a.png"
    assert found["boxes"] == [[1, 2, 5, 7]] and found["labels"] == ["cat"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"categories": []}, r"expected annotations as COCO has them .* KeyError: 3"),
        ({"images": [{"id": 5, "file_name": "../a.png"}]}, "'../a.png' is outside of its folder"),
        ({"annotations": [{"image_id": 5}]}, "KeyError: 'bbox'"),
    ],
)
def test_broken_annotations_are_refused(tmp_path: Path, changed: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_coco(write_coco(tmp_path, **changed)))


@pytest.mark.parametrize(
    "box", [[-1, 2, 4, 5], [1, 2, 17, 5], [4, 2, 4, 5], [1, 5, 4, 2], [1, 2, float("nan"), 5]]
)
def test_boxes_outside_of_the_image_are_refused(box: list[float]) -> None:
    data = records()
    data[3] = {**data[3], "boxes": [box], "labels": ["cat"], "name": "scan 3.png"}
    with pytest.raises(DataError, match=r"image scan 3.png of 16 x 16 pixels: the box .* outside"):
        ObjectDetection().learn(data)


def test_other_records_are_refused() -> None:
    task = task_of()
    with pytest.raises(DataError, match=r"expected a box as four numbers .*, got \[1, 2\]"):
        task.learn([{**records()[0], "boxes": [[1, 2]]}])
    with pytest.raises(DataError, match=r"equally long lists 'boxes' and 'labels', got keys"):
        task.learn([{**records()[0], "labels": []}])
    with pytest.raises(DataError, match="the class 'cow' is not among the 2 known: cat, dog"):
        task.encode([{**records()[0], "labels": ["cow"]}], tools=Tools())
    with pytest.raises(DataError, match="no image has a box"):
        ObjectDetection().learn([{**records()[0], "boxes": [], "labels": []}])
    with pytest.raises(DataError, match=r"image 2 has the shape \(1, 8, 8\), those before it"):
        ObjectDetection().learn([records()[0], {**records(side=8)[0], "boxes": [], "labels": []}])


def test_objects_without_a_cell_are_counted() -> None:
    data = [{**records()[0], "boxes": [[1, 2, 7, 6], [2, 2, 7, 6]], "labels": ["cat", "cat"]}]
    task = task_of(data)
    assert task.notes[1].startswith("1 of 2 objects have no cell of their own in a grid of 2 x 2")
    assert create(task.kind, settings=task.settings).fields == task.fields
