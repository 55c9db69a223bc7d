"""Number formats of the computation: float32 weights, and matrix products in a smaller format."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from shoal.errors import UserError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def compute_context(
    dtype: torch.dtype, *, device: torch.device
) -> AbstractContextManager[torch.autocast | None]:
    """A context in which matrix products run in `dtype`; float32 changes nothing."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def check_compute(name: str, *, device: torch.device) -> torch.dtype:
    """The dtype of `precision.compute`. Raises UserError for one that cannot train here."""
    if name == "float16":
        raise UserError(
            "precision.compute: float16 needs loss scaling, which is not there yet; "
            f"use bfloat16 or float32 on {device.type}"
        )
    return DTYPES[name]
