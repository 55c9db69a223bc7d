"""Bubbles of the pipeline schedules, in closed form; the simulator confirms them."""

from __future__ import annotations

from collections.abc import Sequence


def _idle_share(schedule: str, *, chunks: int) -> float:
    """Idle time in units of one micro batch (forward and backward) per further stage.

    The idle share of a step of m micro batches on p equal stages is then, backward twice forward:
    gpipe and 1f1b (p-1)/(m+p-1) (arXiv 1811.06965, 2104.04473); interleaved with v chunks per rank
    (p-1)/(v m + p-1) (2104.04473, section 2.2). Zero-bubble schedules fill the drain with weight
    gradients (2401.10241): ZB-H1 leaves (p-1)(F+B-W), a third of 1f1b when F = B = W, and with v
    chunks a v-th of that; the V schedule (2405.15362) leaves none when F = B = W, counted from a
    rank's own first piece to its own last.
    """
    if schedule in {"gpipe", "1f1b"}:
        return 1.0
    if schedule == "interleaved-1f1b":
        return 1.0 / chunks
    if schedule == "interleaved-zero-bubble":
        return 1.0 / (3 * chunks)
    if schedule == "zbv-zero-bubble":
        # Ranks start one after the other, half a stage's forward apart, and a step that begins
        # and ends together for all of them waits for that.
        return 1.0 / 6
    raise ValueError(f"unknown schedule {schedule!r}")


def step_seconds(
    schedule: str, *, stages: Sequence[float], micro_batches: int, chunks: int = 1
) -> float:
    """Seconds of a step whose stages take `stages` seconds per micro batch, both passes.

    The slowest stage is never idle between its first and its last micro batch; before and after
    that, the others run one micro batch each (less by the schedule's idle share).
    """
    slowest = max(stages)
    filling = (sum(stages) - slowest) * _idle_share(schedule, chunks=chunks)
    return micro_batches * slowest + filling


def in_flight(
    schedule: str, *, stages: int, stage: int, micro_batches: int, chunks: int = 1
) -> float:
    """Micro batches whose activations stage rank `stage` (0 first) holds at its peak.

    gpipe holds all; 1f1b p - stage (2104.04473); interleaved p - stage + (p - 1 + (v-1) p)/v more
    or less, the factor 1 + (p-1)/(p v) of 2205.05198, section 4.2.3; the V schedule holds p on
    every rank (2405.15362).
    """
    if schedule == "gpipe":
        return float(micro_batches)
    if schedule in {"1f1b", "interleaved-zero-bubble"} and chunks == 1:
        return float(min(micro_batches, stages - stage))
    if schedule == "zbv-zero-bubble":
        return float(min(micro_batches, stages))
    held = (stages - 1 - stage) * 2 + (chunks - 1) * stages + 1
    return min(micro_batches, held / chunks)
