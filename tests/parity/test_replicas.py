"""One seed, one loss curve: replicas of any degree and kind follow one worker."""

from __future__ import annotations

import pytest
from tiny import Bench, largest_difference

KINDS = ("processes", "threads")
DEGREES = (2, 4)
CURVE = 1e-5
"""float32: sums of 16 samples in another order differ by a few units in the last place (6e-8) per
step, and 30 steps of AdamW add some of them up; the promise of DESIGN is 1e-5."""


def replicas(degree: int, kind: str) -> tuple[str, str]:
    return f"parallel.replicate={degree}", f"launch.workers={kind}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("degree", DEGREES)
def test_replicas_follow_one_worker(bench: Bench, degree: int, kind: str) -> None:
    one, many = bench.run(), bench.run(*replicas(degree, kind))
    assert len(many.losses) == 30
    assert largest_difference(many.losses, one.losses) < CURVE
    for name in ("evaluation_loss", "evaluation_targets"):
        found, wanted = ([row[name] for row in run.evaluations] for run in (many, one))
        assert largest_difference(found, wanted) < CURVE
