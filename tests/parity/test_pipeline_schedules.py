"""What a schedule costs by itself: idle time, micro batches held, and the order of its events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal.launch.pool import WorkerPool
from shoal.plan.cost.pipeline import in_flight, step_seconds
from shoal.plan.schedules import order_of
from tiny import Bench
from workers import run_workers

SECONDS = 0.1
"""Of a rank's forward of a micro batch, as of its input's and its weight's gradient: long beside
what a message takes (0.5 ms; 5 ms on a virtual machine that halts idle cores)."""


def timed(pool: WorkerPool, folder: Path, name: str, *, ranks: int, micro: int) -> dict[str, Any]:
    """Idle share of a step with equal stages, what a micro batch took, and each rank's figures."""
    each = 1 if name in ("gpipe", "1f1b") else 2
    out = folder / f"{name}-{ranks}"
    out.mkdir()
    payload = {"schedule": name, "ranks": ranks, "stages_per_rank": each, "micro_batches": micro}
    payload |= {"seconds": SECONDS, "turns": 3, "out": str(out)}
    found = run_workers(pool, "synthetic_stages:run", payload, size=ranks)
    found = sorted(found, key=lambda one: one["rank"])
    steps = [max(turns) for turns in zip(*(one["seconds"] for one in found), strict=True)]
    step = min(steps)
    busy = max(one["busy"][steps.index(step)] for one in found)
    return {"idle": 1 - busy / step, "step": step, "each": busy / micro, "ranks": found}


@pytest.mark.timed
@pytest.mark.quick(1)
@pytest.mark.parametrize(("ranks", "micro"), [(2, 4), (4, 8)])
@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_the_idle_share_is_the_formula_s(
    pool: WorkerPool, tmp_path: Path, name: str, ranks: int, micro: int
) -> None:
    """(p-1)/(m+p-1), within 10 %: the rest is messages and wake-ups."""
    found = timed(pool, tmp_path, name, ranks=ranks, micro=micro)
    wanted = (ranks - 1) / (micro + ranks - 1)
    assert wanted * 0.95 < found["idle"] < wanted * 1.1 + 0.02
    stages = [found["each"]] * ranks
    assert found["step"] == pytest.approx(
        step_seconds(name, stages=stages, micro_batches=micro), rel=0.1
    )


@pytest.mark.timed
@pytest.mark.slow
def test_looped_schedules_idle_less_as_published(pool: WorkerPool, tmp_path: Path) -> None:
    """Each less than the one before it: 1f1b, interleaved, interleaved with zero bubble, V."""
    names = ("1f1b", "interleaved-1f1b", "interleaved-zero-bubble", "zbv-zero-bubble")
    idle = [timed(pool, tmp_path, name, ranks=4, micro=8)["idle"] for name in names]
    print(dict(zip(names, idle, strict=True)))
    assert idle == sorted(idle, reverse=True)
    assert idle[1] == pytest.approx(3 / (2 * 8 + 3), abs=0.04)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["1f1b", "gpipe", "interleaved-1f1b"])
def test_a_rank_holds_as_many_micro_batches_as_the_formula_says(
    pool: WorkerPool, tmp_path: Path, name: str
) -> None:
    """And computes in the order that `shoal simulate` plays."""
    found = timed(pool, tmp_path, name, ranks=2, micro=4)
    chunks = 2 if name == "interleaved-1f1b" else 1
    for rank, one in enumerate(found["ranks"]):
        held = in_flight(name, stages=2, stage=rank, micro_batches=4, chunks=chunks)
        assert one["held"] == held * chunks  # of a rank's stages one by one
        order = order_of(name, rank=rank, ranks=2, micro_batches=4, chunks=chunks)
        assert one["events"] == [[kind, stage, micro] for kind, micro, stage in order]


@pytest.mark.slow
def test_activations_are_kept_for_as_many_micro_batches(bench: Bench) -> None:
    """Peak of live tensors on the first rank: gpipe keeps all 16 micro batches, 1f1b two of them.

    What one costs is told by gpipe with half as many; within 10 % of the whole peak.
    """
    common = ("train.steps=1", "train.evaluate_every_steps=0", "train.micro_batch_samples=2")
    common += ("model.num_hidden_layers=4", "model.hidden_size=64")

    def peak(schedule: str, samples: int) -> int:
        how = f"parallel.pipeline={{degree: 2, schedule: {schedule}, split: [2, 2]}}"
        run = bench.train(*common, how, f"train.global_batch_samples={samples}")
        return int(run.rows[0]["peak_memory_bytes"])

    most = peak("gpipe", 32)
    each = (most - peak("gpipe", 16)) / 8
    assert each > 300_000, "two blocks on two rows of 32 tokens"
    assert peak("1f1b", 32) == pytest.approx(most - 14 * each, rel=0.1)
