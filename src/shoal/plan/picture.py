"""SVG pictures: the frame, the colours and the boxes that those of plans and of steps share."""

from __future__ import annotations

from collections.abc import Iterable

COLOURS = {
    "compute": "#3b6ea5",
    "forward": "#3b6ea5",
    "weights": "#3b6ea5",
    "recompute": "#8fb3d9",
    "backward weights": "#8fb3d9",
    "gathers": "#8fb3d9",
    "backward": "#66a182",
    "shard": "#66a182",
    "gradients": "#66a182",
    "tensor": "#d1495b",
    "activations": "#d1495b",
    "communication": "#d1495b",
    "context": "#edae49",
    "logits": "#edae49",
    "reduce": "#edae49",
    "expert": "#8d6a9f",
    "optimizer": "#8d6a9f",
    "replicate": "#2e8b57",
    "pipeline": "#c77d3b",
    "transient": "#c77d3b",
    "send": "#c77d3b",
    "bubble": "#bbbbbb",
    "reserve": "#bbbbbb",
    "update": "#555555",
    "host": "#e0c3a0",
}


def frame(parts: Iterable[str], *, width: int, height: int, font: int) -> str:
    """A whole SVG of `parts` on white."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'font-family="sans-serif" font-size="{font}">',
            '<rect width="100%" height="100%" fill="white"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def words(text: str, *, x: float, y: float, size: int | None = None) -> str:
    """Text with its left end at `x`."""
    how = f' font-size="{size}"' if size else ""
    return f'<text x="{x}" y="{y}"{how}>{text}</text>'


def box(
    name: str, *, x: float, y: float, width: float, height: float, title: str | None = None
) -> str:
    """A filled box in the colour of `name`; a title shows under the mouse."""
    return (
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}" '
        f'fill="{COLOURS.get(name, "#999999")}"><title>{title or name}</title></rect>'
    )
