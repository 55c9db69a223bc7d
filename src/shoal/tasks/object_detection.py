"""Finding objects in images: a box and a class for each. Score: mAP at an overlap of one half.

YOLOS (arXiv 2106.00666): detection tokens beside the patches of a vision transformer. Which token
answers for which object is fixed instead of matched: token k for what has its middle in cell k of
a square grid. So a small model learns in minutes, and needs no assignment in each step.
Shapes: B images, Q tokens (cells), C classes; boxes are (middle x, middle y, width, height), as
shares of the image.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.errors import DataError
from shoal.fields import Field, Fields
from shoal.tasks.boxes import (
    BINS,
    average_precision,
    corners,
    right_ones,
)
from shoal.tasks.components import Components
from shoal.tasks.pictures import OTHER, new_figure, save, show_image
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
    was,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal.models.anatomy import Anatomy

_MIDDLE = 0.5  # mean and deviation that pixels are normalised with
_NOTHING = 0.2  # weight of a token that answers for no object: most do
_L1, _GIOU = 5.0, 2.0  # weights of the parts of the loss, as DETR's
_SHOWN = 8  # images in the picture
_SURE = 0.5  # of the boxes in it
_FOUND = "#5bd0ff"  # their colour, which is seen on dark images
_FITTED_ON = 1500  # training images that the baseline is fitted on at most


class ObjectDetection(Task):
    """The class (or nothing) and the box of each cell: cross entropy, L1 and generalised IoU."""

    kind = "object-detection"
    auto_class = "AutoModelForObjectDetection"
    needs_tokenizer = False
    labels = "classes"
    target_name = "objects"
    curve = Curve("loss per object")
    own_data = "YOUR.coco.json model.image_size=null model.num_channels=null"
    picture = "boxes.png"

    def __init__(
        self, settings: Mapping[str, Any] | None = None, *, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(settings, options=options)
        self._classes: list[str] = list(self.settings.get("classes", []))
        self._shape: tuple[int, ...] = tuple(self.settings.get("shape", (1, 1, 1)))
        self._grid = int(self.settings.get("grid", self.options.get("grid", 6)))

    @property
    def fields(self) -> Fields:
        """pixel_values uint8 [C, H, W]; of each cell its class (C: nothing there) and its box."""
        cells = self._grid**2
        return {
            "pixel_values": Field("uint8", self._shape),
            "labels": Field("int64", (cells,), fill=len(self._classes)),
            "boxes": Field("float32", (cells, 4)),
        }

    def learn(self, records: Iterable[Record], *, tools: Tools = NO_TOOLS) -> dict[str, Any]:
        """`{"classes": [...], "shape": [C, H, W], "grid": cells a side}`. Raises DataError.

        For images of two sizes, boxes that are outside or empty, and where there is no box at all.
        Notes objects whose cell is taken: there is a place for one in each.
        """
        classes: set[str] = set()
        shape: tuple[int, ...] | None = None
        objects = placed = 0
        for number, record in enumerate(records, start=1):
            image, boxes, labels = _parts(record, number=number)
            shape = shape or image.shape
            if image.shape != shape:
                raise DataError(
                    f"object-detection: image {number} has the shape {image.shape}, those before "
                    f"it {shape} (channels, height, width)\n    scale them to one size first"
                )
            classes.update(labels)
            cells = cells_of(_shares(boxes, shape), grid=self._grid)
            objects, placed = objects + len(boxes), placed + len(set(cells) - {None})
        if not classes or shape is None:
            raise DataError(
                "object-detection: no image has a box\n    name a source whose records have some"
            )
        self._classes, self._shape = sorted(classes), shape
        self.settings = {"classes": self._classes, "shape": list(shape), "grid": self._grid}
        self.notes = [f"{objects:,} objects of {len(classes)} classes"]
        if placed < objects:
            self.notes.append(
                f"{objects - placed:,} of {objects:,} objects have no cell of their own in a grid "
                f"of {self._grid} x {self._grid} and are not learned; task.grid makes it finer"
            )
        return self.settings

    def model_settings(self) -> dict[str, Any]:
        """Size of the images, one token for each cell, and names of the classes."""
        channels, height, width = self._shape
        return {
            "image_size": [height, width],
            "num_channels": channels,
            "num_detection_tokens": self._grid**2,
            "use_mid_position_embeddings": False,
            "num_labels": len(self._classes),
            "id2label": dict(enumerate(self._classes)),
            "label2id": {name: index for index, name in enumerate(self._classes)},
        }

    def encode(self, records: Sequence[Record], *, tools: Tools) -> list[Sample]:
        """`{"image", "boxes": [[left, top, right, bottom], ...], "labels"}` -> one row per cell.

        Boxes come in pixels. Raises DataError for what `learn` refuses, or a class it has not seen.
        """
        ids = {name: index for index, name in enumerate(self._classes)}
        samples: list[Sample] = []
        for number, record in enumerate(records, start=1):
            image, boxes, names = _parts(record, number=number)
            unknown = next((name for name in names if name not in ids), None)
            if unknown is not None:
                raise DataError(
                    f"object-detection: the class {unknown!r} is not among the {len(ids)} known: "
                    f"{', '.join(ids)}\n    let the task learn its classes from all parts of the "
                    "data"
                )
            shares = _shares(boxes, image.shape)
            labels = np.full(self._grid**2, len(ids))
            places = np.zeros((self._grid**2, 4), dtype=np.float32)
            for cell, box, name in zip(cells_of(shares, grid=self._grid), shares, names):
                if cell is not None:
                    labels[cell], places[cell] = ids[name], box
            samples.append({"pixel_values": image, "labels": labels, "boxes": places})
        return samples

    def count(self, batch: Batch) -> int:
        """Objects."""
        return int((batch["labels"] < len(self._classes)).sum())

    def specimens(self, config: Any) -> list[Sample]:
        """Noise, with two objects each."""
        draw, cells = np.random.default_rng(0), self._grid**2
        samples: list[Sample] = []
        for _ in range(4):
            labels = np.full(cells, len(self._classes))
            labels[draw.permutation(cells)[:2]] = draw.integers(len(self._classes), size=2)
            image = draw.integers(256, size=self._shape, dtype=np.uint8)
            boxes = draw.uniform(0.2, 0.6, size=(cells, 4)).astype(np.float32)
            samples.append({"pixel_values": image, "labels": labels, "boxes": boxes})
        return samples

    def user_call(self, batch: Batch) -> dict[str, Tensor]:
        """Pixels as the exported processor makes them. transformers' loss is another: it matches
        tokens to objects in each step."""
        return {"pixel_values": (batch["pixel_values"].double() / 255 - _MIDDLE) / _MIDDLE}

    def user_losses(self, made: Any, batch: Batch, *, evaluated: bool = False) -> tuple[float, int]:
        """Of what its users read: the logits and `pred_boxes`."""
        losses = detection_losses(made.logits, made.pred_boxes, batch)
        return float(losses.sum()), self.count(batch)

    def output(self, model: nn.Module, anatomy: Anatomy, batch: Batch, *, step: int = 0) -> Output:
        """Hidden states of the detection tokens [B, Q, D], and classes and boxes of the cells."""
        import torch

        from shoal.models.anatomy import hidden_of, logits_of
        from shoal.tasks.losses import Summed

        dtype = next(model.parameters()).dtype
        pixels = (batch["pixel_values"].to(dtype) / 255 - _MIDDLE) / _MIDDLE
        classifier, predictor = logits_of(model), model.get_submodule("bbox_predictor")
        ids = batch.get("sample_ids")
        real = batch["labels"].new_ones(len(pixels)) if ids is None else (ids >= 0)

        def losses(hidden: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
            found = detection_losses(classifier(hidden), predictor(hidden).sigmoid(), fields)
            return found * fields["real"][:, None]  # rows that only fill a batch teach nothing

        def guess(hidden: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
            chances = classifier(hidden).float().softmax(-1)[..., :-1]
            return torch.cat([chances, predictor(hidden).float().sigmoid()], dim=-1)

        return Output(
            hidden=hidden_of(model, {**batch, "pixel_values": pixels}, step=step),
            fields={"labels": batch["labels"], "boxes": batch["boxes"], "real": real},
            loss=Summed(losses, guess=guess),
        )

    def metrics(self) -> DetectionMetrics:
        """A fresh accumulator for the classes learned."""
        return DetectionMetrics(self._classes, channels_height_width=self._shape)

    def baseline(self, data: Evaluated) -> Named:
        """mAP of bright components, each named by the three training objects most like it."""
        known = Components(num_classes=len(self._classes))
        for number, row in enumerate(data.training_rows()):
            if number == _FITTED_ON:
                break
            known.learn(*_stored(row, num_classes=len(self._classes)))
        counts = DetectionCounts(len(self._classes))
        for row in data.rows():
            image, boxes, labels = _stored(row, num_classes=len(self._classes))
            found, chances = known.find(image)
            counts.add(chances, found, boxes=boxes, labels=labels)
        return {"components_map": counts.mean_average_precision()}

    def words(self, before: Named | None, after: Named) -> list[str]:
        """mAP before and after, beside components and neighbours."""
        return [
            f"mAP@0.5: {was(before, 'map', 3)}{after['map']:.3f} now; bright components named by "
            f"their nearest neighbours: {after['components_map']:.3f}"
        ]

    def files(self) -> dict[str, str]:
        """preprocessor_config.json: how transformers makes pixel values of an image."""
        channels, height, width = self._shape
        settings = {
            "image_processor_type": "YolosImageProcessor",
            "do_resize": True,
            "size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [_MIDDLE] * channels,
            "image_std": [_MIDDLE] * channels,
            "do_pad": False,
        }
        return {"preprocessor_config.json": json.dumps(settings, indent=1) + "\n"}

    def draw(self, shown: Mapping[str, Any], path: Path) -> None:
        """Images with the boxes that are true (dashed) and those that were found."""
        from matplotlib.patches import Rectangle

        images = shown["images"]
        columns = min(4, len(images))
        rows = -(-len(images) // columns)
        figure = new_figure(2.7 * columns, 2.9 * rows)
        for axes in (grid := figure.subplots(rows, columns, squeeze=False)).flat:
            axes.set_axis_off()
        for axes, (image, true, found) in zip(grid.flat, images):
            show_image(axes, image)
            for boxes, line, colour in ((true, "--", OTHER), (found, "-", _FOUND)):
                for left, top, right, bottom, *_ in boxes:
                    size = right - left, bottom - top
                    axes.add_patch(Rectangle((left, top), *size, fill=False, ls=line, ec=colour))
            for left, top, _, _, name, score in found:
                text = f"{shown['names'][name]} {100 * score:.0f} %"
                axes.text(left, top - 1, text, color=_FOUND, fontsize=8, va="bottom")
        save(figure, path)


def detection_losses(logits: Tensor, boxes: Tensor, wanted: Mapping[str, Tensor]) -> Tensor:
    """The loss of each cell [B, Q]: cross entropy, and of an object 5 x L1 + 2 x (1 - GIoU).

    Logits [B, Q, C + 1], boxes [B, Q, 4], `wanted` labels [B, Q] (C is nothing, of less weight) and
    boxes [B, Q, 4]. DETR, arXiv 2005.12872, equations 1 and 2, with the assignment given; GIoU:
    arXiv 1902.09630.
    """
    import torch
    from torch.nn.functional import cross_entropy

    labels = wanted["labels"]
    nothing = logits.shape[-1] - 1
    is_object = (labels != nothing).to(logits.dtype)
    each = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    weight = is_object + _NOTHING * (1 - is_object)
    true = wanted["boxes"].to(boxes.dtype)
    # where nothing is any box will do, but one with an area
    true = torch.where(is_object[..., None] > 0, true, boxes.detach())
    apart = (boxes - true).abs().sum(-1)
    found = _L1 * apart + _GIOU * (1 - _generalised_iou(boxes, true))
    return each.view_as(labels) * weight + found * is_object


def _generalised_iou(one: Tensor, other: Tensor) -> Tensor:
    """Of each pair of boxes [..., 4]: IoU less what of the box around both neither has."""
    import torch

    low = [box[..., :2] - box[..., 2:] / 2 for box in (one, other)]
    high = [box[..., :2] + box[..., 2:] / 2 for box in (one, other)]
    shared = (torch.minimum(*high) - torch.maximum(*low)).clamp(min=0).prod(-1)
    union = one[..., 2:].prod(-1) + other[..., 2:].prod(-1) - shared
    around = (torch.maximum(*high) - torch.minimum(*low)).prod(-1)
    return shared / union.clamp(min=1e-9) - (around - union) / around.clamp(min=1e-9)


def cells_of(boxes: np.ndarray[Any, Any], *, grid: int) -> list[int | None]:
    """The cell of each box's middle, row by row; None where a box before it has the cell."""
    found: list[int | None] = []
    for across, down, *_ in boxes:
        column, row = (min(grid - 1, int(share * grid)) for share in (across, down))
        cell = row * grid + column
        found.append(None if cell in found else cell)
    return found


class DetectionCounts:
    """How many boxes of each confidence are right and wrong, by class; and true ones."""

    def __init__(self, num_classes: int) -> None:
        self.sums = np.zeros((num_classes, 2 * BINS + 1))

    def add(
        self,
        chances: np.ndarray[Any, Any],
        found: np.ndarray[Any, Any],
        *,
        boxes: np.ndarray[Any, Any],
        labels: np.ndarray[Any, Any],
    ) -> None:
        """Count one image: chances [N, C] of found boxes [N, 4], true boxes [M, 4] and labels.

        A found box counts once, as its likeliest class.
        """
        classes = chances.argmax(axis=1) if len(chances) else np.zeros(0, dtype=np.int64)
        scores = chances.max(axis=1) if len(chances) else np.zeros(0)
        right = right_ones(found, classes, scores, boxes=boxes, labels=labels)
        bins = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
        np.add.at(self.sums, (classes, np.where(right, bins, BINS + bins)), 1)
        np.add.at(self.sums[:, 2 * BINS], labels, 1)

    def mean_average_precision(self) -> float:
        """Of the classes that are anywhere."""
        found = [
            average_precision(each[:BINS], each[BINS : 2 * BINS], total=each[-1])
            for each in self.sums
            if each[-1]
        ]
        return float(np.mean(found)) if found else math.nan


class DetectionMetrics:
    """Sums over images: the loss, objects, and by class the boxes of each confidence."""

    needs_predictions = True

    def __init__(self, names: Sequence[str], *, channels_height_width: Sequence[int]) -> None:
        self._names, (_, height, width) = list(names), channels_height_width
        self._scale = np.array([width, height, width, height], dtype=np.float64)
        self._sums = np.zeros(2)
        self._counts = DetectionCounts(len(names))
        self._images = Examples(_SHOWN)

    def add(self, *, batch: Batch, scores: Scores) -> None:
        """Count losses [B, Q] and predictions [B, Q, C + 4] of the batch's labels and boxes."""
        assert scores.predictions is not None, "boxes are scored by the predictions"
        made, losses = np.asarray(scores.predictions.double()), np.asarray(scores.losses.double())
        for row in np.flatnonzero(real_rows(batch)):
            stored = {name: np.asarray(each[row]) for name, each in batch.items()}
            image, boxes, labels = _stored(stored, num_classes=len(self._names))
            chances, found = made[row, :, :-4], corners(made[row, :, -4:]) * self._scale
            self._sums += [losses[row].sum(), len(labels)]
            self._counts.add(chances, found, boxes=boxes, labels=labels)
            if self._images.wants(batch, int(row)):
                sure = np.flatnonzero(chances.max(axis=1) >= _SURE)
                example = [
                    image.tolist(),
                    boxes.tolist(),
                    [
                        [*found[n].round(2).tolist(), int(chances[n].argmax()), chances[n].max()]
                        for n in sure
                    ],
                ]
                self._images.keep(batch, int(row), example)

    @property
    def examples(self) -> Sequence[Sequence[Any]]:
        """The first images: pixels, true boxes, sure boxes with class and confidence."""
        return self._images.found

    def vector(self) -> Vector:
        """[loss, objects, counts by class and confidence]."""
        return np.append(self._sums, self._counts.sums.ravel())

    def result(self, vector: Vector | None = None) -> Named:
        """Loss per object and mAP@0.5."""
        sums = self.vector() if vector is None else vector
        loss, objects = float(sums[0]), float(sums[1])
        counts = DetectionCounts(len(self._names))
        counts.sums = sums[2:].reshape(counts.sums.shape)
        return {
            "evaluation_loss": loss / objects if objects else math.nan,
            "map": counts.mean_average_precision(),
            "evaluation_targets": objects,
        }

    def shown(self, vector: Vector, examples: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """The first images with their boxes in pixels."""
        return {
            "names": self._names,
            "images": [example for _, _, example in examples[:_SHOWN]],
        }


def _stored(
    row: Mapping[str, Any], *, num_classes: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(pixels [C, H, W], boxes [M, 4] as corners in pixels, labels [M]) of a stored image."""
    image = np.asarray(row["pixel_values"])
    labels = np.asarray(row["labels"]).astype(np.int64)
    there = labels < num_classes
    height, width = image.shape[1:]
    boxes = corners(np.asarray(row["boxes"])[there]) * [width, height, width, height]
    return image, boxes, labels[there]


def _shares(boxes: np.ndarray[Any, Any], shape: Sequence[int]) -> np.ndarray[Any, Any]:
    """Corners in pixels [M, 4] -> (middle x, middle y, width, height) as shares of the image."""
    height, width = shape[1:]
    scaled = boxes / np.array([width, height, width, height])
    middle, size = (scaled[:, :2] + scaled[:, 2:]) / 2, scaled[:, 2:] - scaled[:, :2]
    return np.concatenate([middle, size], axis=1)


def _parts(
    record: Record, *, number: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], list[str]]:
    """Image, boxes [M, 4] in pixels, and names. Raises DataError for what is none of these."""
    image, boxes, labels = (record.get(name) for name in ("image", "boxes", "labels"))
    is_image = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3
    both = isinstance(boxes, list) and isinstance(labels, list) and len(boxes) == len(labels)
    if image is None or not is_image or not both:
        raise DataError(
            "object-detection: expected a record with an array of bytes [channels, height, width] "
            f"under 'image', and equally long lists 'boxes' and 'labels', got keys {sorted(record)}"
            "\n    name a source of images with boxes (.coco.json), or use another task.kind"
        )
    assert isinstance(boxes, list) and isinstance(labels, list), "checked"
    height, width = image.shape[1:]
    where = f"object-detection: image {record.get('name', number)} of {width} x {height} pixels"
    for box in boxes:
        try:
            left, top, right, bottom = (float(each) for each in box)
        except (TypeError, ValueError):
            raise DataError(
                f"{where}: expected a box as four numbers (left, top, right, bottom), got "
                f"{str(box)[:60]}\n    mend or remove it"
            ) from None
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise DataError(
                f"{where}: the box {box} (left, top, right, bottom) is empty, or outside of the "
                "image\n    cut it to the image, or remove it"
            )
    return image, np.array(boxes, dtype=np.float64).reshape(-1, 4), [str(each) for each in labels]
