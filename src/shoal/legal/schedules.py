"""Schedules of a pipeline by name, and how many micro batches each takes."""

from __future__ import annotations

SCHEDULES = ("gpipe", "1f1b", "interleaved-1f1b", "interleaved-zero-bubble", "zbv-zero-bubble")
"""In which order a pipeline's stages compute; all but the first two have several on each rank."""
ONE_STAGE = frozenset({"gpipe", "1f1b"})
ZERO_BUBBLE = frozenset({"interleaved-zero-bubble", "zbv-zero-bubble"})
"""They make gradients of inputs first, and those of weights when there is nothing else to do."""


def fits_schedule(name: str, *, ranks: int, micro_batches: int) -> bool:
    """Whether a schedule takes so many micro batches of a step on `ranks` ranks."""
    least, multiple = schedule_takes(name, ranks=ranks)
    return micro_batches >= least and micro_batches % multiple == 0


def schedule_takes(name: str, *, ranks: int) -> tuple[int, int]:
    """Micro batches of a step that a schedule needs at least, and a multiple of what it takes."""
    if name == "gpipe" or ranks == 1:
        return 1, 1
    return (ranks, 1) if name in ("1f1b", "zbv-zero-bubble") else (ranks, ranks)
