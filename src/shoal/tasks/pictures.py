"""Parts that pictures of tasks share. matplotlib is imported where it draws; no torch."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STRONG, OTHER, QUIET = "#1f6f8b", "#d17a00", "#777777"
"""What it is about, what stands beside, and the rest; as in loss.png."""

_NAMED_CELLS = 12
"""Classes up to which each cell of a confusion matrix has its number."""

_MOST_SIDE = 64
"""Pixels of a side of an image that is kept for a picture; of a larger one every second or so."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches. No pyplot: no display, no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write the figure."""
    figure.savefig(path, dpi=110)


def confusion_matrix(axes: Axes, counts: NDArray[np.float64], names: Sequence[str]) -> None:
    """How often class i (a row) was taken for class j [C, C], as shares of each row."""
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    few = len(names) <= _NAMED_CELLS
    for row, column in np.ndindex(*counts.shape) if few else ():
        if counts[row, column]:
            colour = "white" if shares[row, column] > 0.5 else "black"
            text = f"{counts[row, column]:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    if few:
        axes.set_xticks(range(len(names)), names, rotation=45 if max(map(len, names)) > 3 else 0)
        axes.set_yticks(range(len(names)), names)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("taken for")
    axes.set_ylabel("is")


def draw_confusion(shown: Mapping[str, Any], path: Path) -> None:
    """The picture of a confusion matrix alone, of `{"names": [...], "confusion": [[...], ...]}`."""
    figure = new_figure(5.2, 4.6)
    confusion_matrix(figure.add_subplot(), np.array(shown["confusion"]), shown["names"])
    save(figure, path)


def draw_numbers(shown: Mapping[str, Any], path: Path) -> None:
    """The picture of guesses against numbers, of `{"pairs": [[number, guess], ...]}`."""
    figure = new_figure(5.2, 4.6)
    axes = figure.add_subplot()
    numbers, guesses = np.array(shown["pairs"], dtype=np.float64).reshape(-1, 2).T
    axes.plot(numbers, guesses, "o", color=STRONG, markersize=3, alpha=0.5)
    axes.axline((float(numbers.mean()), float(numbers.mean())), slope=1, color=QUIET, linewidth=0.8)
    axes.set_xlabel("is")
    axes.set_ylabel("said")
    save(figure, path)


def write_table(rows: Sequence[Sequence[str]], *, path: Path) -> None:
    """A page with a table of texts, the first row its head: a browser has letters for all."""
    lines = ["".join(f"<td>{html.escape(each)}</td>" for each in row) for row in rows]
    style = "table {border-collapse: collapse} td {border: 1px solid; padding: 6px}"
    style += " tr:first-child {font-weight: bold}"
    table = "\n".join(f"<tr>{line}</tr>" for line in lines)
    head = f'<!doctype html><meta charset="utf-8"><style>{style}</style>'
    path.write_text(f"{head}\n<table>\n{table}\n</table>\n", encoding="utf-8")


def small_image(pixels: NDArray[Any]) -> list[Any]:
    """An image uint8 [C, H, W] as nested lists, at most 64 pixels a side."""
    step = -(-max(pixels.shape[1:]) // _MOST_SIDE)
    found: list[Any] = pixels[:, ::step, ::step].tolist()
    return found


def show_image(axes: Axes, image: Sequence[Any]) -> None:
    """Draw what `small_image` gave, without ticks."""
    pixels = np.array(image, dtype=np.uint8)
    grey = len(pixels) == 1
    shown = pixels[0] if grey else np.moveaxis(pixels[:3], 0, 2)
    axes.imshow(shown, cmap="gray" if grey else None, vmin=0, vmax=255)
    axes.set_xticks([])
    axes.set_yticks([])
