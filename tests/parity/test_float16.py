"""float16 with a scaled loss: the scale changes no bit, overflow skips a step on every rank."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from scaled_loss import steps_of
from shoal.launch.pool import WorkerPool
from tiny import Bench, largest_difference

ALONE = ("parallel.replicate=1",)
TWO = ("parallel.replicate=2",)
CUT = ("parallel.shard=2",)
ROWS = ("parallel.context=2",)
slow = pytest.mark.slow


def layouts(*, quick: tuple[str, ...], among: tuple[tuple[str, ...], ...]) -> pytest.MarkDecorator:
    """One layout that always runs, the others with the slow tests."""
    values = [
        pytest.param(words, id=words[0], marks=() if words == quick else slow) for words in among
    ]
    return pytest.mark.parametrize("layout", values)


@pytest.mark.slow
@layouts(quick=CUT, among=(ALONE, TWO, CUT))
def test_a_power_of_two_changes_no_bit(
    bench: Bench, pool: WorkerPool, tmp_path: Path, layout: tuple[str, ...]
) -> None:
    """In float32 nothing over- or underflows, so a scale must leave every digit as it was."""
    ran = {
        scale: steps_of(
            bench.run(),
            layout,
            pool=pool,
            out=tmp_path / f"{scale}",
            compute="float32",
            scale=scale,
        )
        for scale in (1.0, 4096.0)
    }
    for plain, scaled in zip(ran[1.0], ran[4096.0], strict=True):
        assert scaled[-1]["scale"] == 4 * 4096.0, "eight steps went well, and patience is three"
        for name in ("loss", "norm", "norms", "digest"):
            assert [row[name] for row in plain] == [row[name] for row in scaled]


@layouts(quick=TWO, among=(ALONE, TWO, CUT, ROWS))
def test_float16_follows_float32(
    bench: Bench, pool: WorkerPool, tmp_path: Path, layout: tuple[str, ...]
) -> None:
    """11 bits against 24: a loss of 8 steps agrees to about 2^-11, and every rank says the same."""
    wanted = steps_of(
        bench.run(), ALONE, pool=pool, out=tmp_path / "wanted", compute="float32", scale=None
    )[0]
    found = steps_of(
        bench.run(), layout, pool=pool, out=tmp_path / "found", compute="float16", scale=4096.0
    )
    assert all(row["applied"] for row in found[0])
    assert (
        largest_difference([row["loss"] for row in found[0]], [row["loss"] for row in wanted])
        < 2 * 2**-11
    )
    for rows in found:
        assert [row["loss"] for row in rows] == [row["loss"] for row in found[0]]
        assert [row["scale"] for row in rows] == [row["scale"] for row in found[0]]


@layouts(quick=TWO, among=(TWO, CUT, ROWS))
def test_overflow_skips_the_step_on_every_rank_and_halves_the_scale(
    bench: Bench, pool: WorkerPool, tmp_path: Path, layout: tuple[str, ...]
) -> None:
    """2^24 overflows float16 from the first step: the scale halves, step by step, until it fits;
    one rank's infinite gradient later halves it for all."""
    found = steps_of(
        bench.run(),
        layout,
        pool=pool,
        out=tmp_path / "found",
        compute="float16",
        scale=2.0**24,
        poisoned=14,
        steps=16,
    )
    for rows in found:
        assert [row["applied"] for row in rows] == [row["applied"] for row in found[0]]
        assert [row["scale"] for row in rows] == [row["scale"] for row in found[0]]
    rows = found[0]
    assert not rows[0]["applied"] and not math.isfinite(rows[0]["norm"])
    assert rows[0]["scale"] == 2.0**23
    skipped = [index for index, row in enumerate(rows) if not row["applied"]]
    assert len(skipped) < 12 and 14 in skipped
    assert rows[14]["scale"] == rows[13]["scale"] / 2
    assert rows[14]["digest"] == rows[13]["digest"], "a skipped step changes nothing"
    assert rows[-1]["facts"]["loss_scale"]["value"] == rows[-1]["scale"], "checkpoints keep it"
