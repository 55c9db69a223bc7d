"""What a batch is made of: one description per array, shared by tasks, data and models. No torch.

Shapes: B rows of a batch, T positions of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

IGNORED = -100
"""The label of a position without a target."""

Dtype = Literal["uint8", "int32", "int64", "float32"]


@dataclass(frozen=True)
class Field:
    """One array of a sample: `(None,)` a row of tokens, `(3, 32, 32)` an image, `()` a number.

    `sequence` names what a None in `dims` runs along (tokens, source, target, frames, ...): fields
    of one sequence have the same length in a sample, and are padded and trimmed together.
    """

    dtype: Dtype
    dims: tuple[int | None, ...]
    fill: float = 0
    """The value of padding, and of rows that only fill a batch."""
    sequence: str | None = None

    def __post_init__(self) -> None:
        ragged = self.dims.count(None)
        if ragged > 1 or bool(ragged) != (self.sequence is not None):
            raise ValueError(
                f"field of dims {self.dims}: expected one None with the name of its sequence, or "
                f"neither, got sequence {self.sequence!r}"
            )

    @property
    def ragged_dim(self) -> int | None:
        """The dim that differs from sample to sample; None: all have the same shape."""
        return self.dims.index(None) if self.sequence is not None else None

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Field:
        """The inverse of `dataclasses.asdict`, whose tuple JSON makes a list."""
        return cls(**{**tree, "dims": tuple(tree["dims"])})


Fields = Mapping[str, Field]

TOKENS: Fields = {
    "input_ids": Field("int64", (None,), sequence="tokens"),
    "labels": Field("int64", (None,), fill=IGNORED, sequence="tokens"),
    "position_ids": Field("int64", (None,), sequence="tokens"),
    "document_ids": Field("int32", (None,), fill=-1, sequence="tokens"),
}
"""A row of tokens with a label for each: position 0 begins a document, document -1 is padding."""
