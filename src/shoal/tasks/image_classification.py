"""Giving each image one of several classes. Scores: accuracy and macro F1."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.errors import DataError
from shoal.fields import IGNORED, Field, Fields
from shoal.tasks.baselines import Labelled, logistic_regression
from shoal.tasks.pictures import confusion_matrix, new_figure, save, show_image, small_image
from shoal.tasks.scores import ClassMetrics, Examples
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
    was,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shoal.models.anatomy import Anatomy

_MIDDLE = 0.5
"""Mean and deviation that pixels (0 to 1) are normalised with: they end in -1 to 1."""


_FITTED_ON = 10_000
"""Training images that the baseline is fitted on at most: more take long, and change little."""


_MISREAD = 12
"""Images in the picture, beside the confusion matrix."""


class ImageClassification(Task):
    """One label per image. Images are stored as they are (uint8) and normalised on the device."""

    kind = "image-classification"
    auto_class = "AutoModelForImageClassification"
    needs_tokenizer = False
    labels = "classes"
    target_name = "images"
    picture = "confusion.png"
    own_data = "YOUR-FOLDER model.image_size=null model.num_channels=null"
    curve = Curve(
        "nats per image", baseline="logistic_regression_loss", baseline_name="logistic regression"
    )

    def __init__(
        self, settings: Mapping[str, Any] | None = None, *, options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(settings, options=options)
        self._classes: list[str] = list(self.settings.get("classes", []))
        self._shape: tuple[int, ...] = tuple(self.settings.get("shape", (1, 1, 1)))

    @property
    def fields(self) -> Fields:
        """pixel_values uint8 [C, H, W] and its class."""
        return {
            "pixel_values": Field("uint8", self._shape),
            "labels": Field("int64", (), fill=IGNORED),
        }

    def learn(self, records: Iterable[Record], *, tools: Tools = NO_TOOLS) -> dict[str, Any]:
        """`{"classes": [...], "shape": [C, H, W]}`. Raises DataError for images of two sizes."""
        classes: set[str] = set()
        shape: tuple[int, ...] | None = None
        for number, record in enumerate(records, start=1):
            image, label = _image_and_label(record)
            shape = shape or image.shape
            if image.shape != shape:
                raise DataError(
                    f"image-classification: image {number} has the shape {image.shape}, those "
                    f"before it {shape} (channels, height, width)\n    scale them to one size first"
                )
            classes.add(label)
        self._classes, self._shape = sorted(classes), shape or self._shape
        self.settings = {"classes": self._classes, "shape": list(self._shape)}
        return self.settings

    def model_settings(self) -> dict[str, Any]:
        """The size of the images, and names of the classes. Raises DataError: not square."""
        channels, height, width = self._shape
        if height != width:
            raise DataError(
                f"image-classification: expected square images, got {height} x {width}\n"
                "    cut or pad them to a square first"
            )
        return {
            "image_size": height,
            "num_channels": channels,
            "num_labels": len(self._classes),
            "id2label": dict(enumerate(self._classes)),
            "label2id": {name: index for index, name in enumerate(self._classes)},
        }

    def encode(self, records: Sequence[Record], *, tools: Tools) -> list[Sample]:
        """`{"image": uint8 [C, H, W], "label": str}` -> `pixel_values` and `labels`.

        Raises DataError for a record without them, or a class that `learn` has not seen.
        """
        ids = {name: index for index, name in enumerate(self._classes)}
        pairs = [_image_and_label(record) for record in records]
        unknown = next((label for _, label in pairs if label not in ids), None)
        if unknown is not None:
            raise DataError(
                f"image-classification: the class {unknown!r} is not among the {len(ids)} known: "
                f"{', '.join(ids)}\n    let the task learn its classes from all parts of the data"
            )
        return [{"pixel_values": image, "labels": ids[label]} for image, label in pairs]

    def specimens(self, config: Any) -> list[Sample]:
        """Noise, with a class for each."""
        draw, shape = np.random.default_rng(0), self._shape
        labels = draw.integers(len(self._classes), size=4)
        images = draw.integers(256, size=(4, *shape), dtype=np.uint8)
        return [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, labels)]

    def user_call(self, batch: Batch) -> dict[str, Tensor]:
        """Pixels as the exported processor makes them."""
        pixels = (batch["pixel_values"].double() / 255 - _MIDDLE) / _MIDDLE
        return {"pixel_values": pixels, "labels": batch["labels"]}

    def output(self, model: nn.Module, anatomy: Anatomy, batch: Batch, *, step: int = 0) -> Output:
        """Hidden states [B, D] that the classifier reads, and the class of each image [B]."""
        from torch.nn.functional import cross_entropy

        from shoal.models.anatomy import hidden_of, logits_of
        from shoal.tasks.losses import Summed

        dtype = next(model.parameters()).dtype
        images = batch["pixel_values"]
        most = self.options.get("shift_pixels", 0)
        if model.training and most and "sample_ids" in batch:
            images = shifted(images, batch["sample_ids"], most=most)
        pixels = (images.to(dtype) / 255 - _MIDDLE) / _MIDDLE
        head = logits_of(model)

        def losses(hidden: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
            # zero where the label is ignored
            return cross_entropy(head(hidden), fields["labels"], reduction="none")

        return Output(
            hidden=hidden_of(model, {**batch, "pixel_values": pixels}, step=step),
            fields={"labels": batch["labels"]},
            loss=Summed(losses, guess=lambda hidden, fields: head(hidden).argmax(dim=-1)),
        )

    def metrics(self) -> ImageMetrics:
        """A fresh accumulator for the classes learned."""
        return ImageMetrics(self._classes)

    def baseline(self, data: Evaluated) -> Named:
        """Accuracy and loss of logistic regression on the pixels, fitted on training images."""
        train, scored = (
            Labelled.of([(row["pixel_values"], int(row["labels"])) for row in rows], scale=255)
            for rows in (itertools.islice(data.training_rows(), _FITTED_ON), data.rows())
        )
        accuracy, loss, _ = logistic_regression(
            train, scored=scored, num_classes=len(self._classes)
        )
        return {"logistic_regression_accuracy": accuracy, "logistic_regression_loss": loss}

    def words(self, before: Named | None, after: Named) -> list[str]:
        """Accuracy before and after, beside that of logistic regression."""
        return [
            f"accuracy: {was(before, 'accuracy', 3)}{after['accuracy']:.3f} now; logistic "
            f"regression on the pixels: {after['logistic_regression_accuracy']:.3f}"
        ]

    def draw(self, shown: Mapping[str, Any], path: Path) -> None:
        """The confusion matrix, and beside it images that were taken for something else."""
        names, wrong = shown["names"], shown["misread"]
        figure = new_figure(9 if wrong else 5, 4.6)
        left, *right = figure.subfigures(1, 2, width_ratios=(1, 0.9)) if wrong else [figure]
        confusion_matrix(left.add_subplot(), np.array(shown["confusion"]), names)
        for axes, (image, label, guess) in zip(
            right[0].subplots(3, 4).flat if wrong else (), wrong
        ):
            show_image(axes, image)
            axes.set_title(f"{names[label]}, not {names[guess]}", fontsize=8)
        for axes in right[0].axes[len(wrong) :] if wrong else ():
            axes.set_axis_off()
        save(figure, path)

    def files(self) -> dict[str, str]:
        """preprocessor_config.json: how transformers makes pixel values of an image."""
        channels, height, width = self._shape
        settings = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [_MIDDLE] * channels,
            "image_std": [_MIDDLE] * channels,
        }
        return {"preprocessor_config.json": json.dumps(settings, indent=1) + "\n"}


class ImageMetrics(ClassMetrics):
    """Sums of classes, and the first images that were taken for something else."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(len(names))
        self._names, self._misread = list(names), Examples(_MISREAD)

    def add(self, *, batch: Batch, scores: Scores) -> None:
        """Count as every class, and keep what was misread of `pixel_values` [B, C, H, W]."""
        super().add(batch=batch, scores=scores)
        labels, guesses = np.asarray(batch["labels"]), np.asarray(scores.predictions)
        for row in np.flatnonzero((labels != guesses) & (labels != IGNORED)):
            if self._misread.wants(batch, int(row)):
                image = small_image(np.asarray(batch["pixel_values"][row]))
                example = [image, int(labels[row]), int(guesses[row])]
                self._misread.keep(batch, int(row), example)

    @property
    def examples(self) -> Sequence[Sequence[Any]]:
        """The first misread ones: image, label, guess."""
        return self._misread.found

    def shown(self, vector: Vector, examples: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """The confusion matrix, and misread images."""
        return {
            "names": self._names,
            "confusion": vector[1:].reshape(self._confusion.shape).tolist(),
            "misread": [example for _, _, example in examples[:_MISREAD]],
        }


def shifted(images: Tensor, sample_ids: Tensor, *, most: int) -> Tensor:
    """Images [B, C, H, W], each moved by up to `most` pixels along both dims; zeros come in.

    By how much depends on the sample's id alone, which differs from pass to pass over the data and
    is the same in every layout.
    """
    import torch
    from torch.nn.functional import pad

    rows, channels, height, width = images.shape
    key = sample_ids * -7046029254386353131  # 2**64 / golden ratio, as signed: bits are well mixed
    at = torch.arange(max(height, width), device=images.device)
    down = ((key >> 40) & 0xFFFF) % (2 * most + 1)
    right = ((key >> 20) & 0xFFFF) % (2 * most + 1)
    return pad(images, (most,) * 4)[
        torch.arange(rows, device=images.device)[:, None, None, None],
        torch.arange(channels, device=images.device)[None, :, None, None],
        (at[:height] + down[:, None])[:, None, :, None],
        (at[:width] + right[:, None])[:, None, None, :],
    ]


def _image_and_label(record: Record) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], str]:
    image, label = record.get("image"), record.get("label")
    is_image = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3
    if image is None or not is_image or not isinstance(label, str):
        raise DataError(
            "image-classification: expected a record with an array of bytes [channels, height, "
            f"width] under 'image' and a name under 'label', got keys {sorted(record)}\n"
            "    name a source of images, or use another task.kind"
        )
    return image, label
