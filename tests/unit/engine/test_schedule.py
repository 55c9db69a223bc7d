"""Schedules: the rates at their turning points."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config.optimizers import Constant, Cosine, Linear, ScheduleSection, WarmupStableDecay
from shoal.engine.schedule import rate_factor

SCHEDULES = [
    Constant(warmup_steps=4),
    Linear(warmup_steps=4, final_fraction=0.2),
    Cosine(warmup_steps=4, final_fraction=0.2),
    WarmupStableDecay(warmup_steps=4, decay_steps=10, final_fraction=0.2),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.kind)
def test_turning_points(schedule: ScheduleSection) -> None:
    rates = [rate_factor(step, steps=50, schedule=schedule) for step in range(51)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    final = 1.0 if schedule.kind == "constant" else 0.2
    assert rates[50] == pytest.approx(final)
    falling = rates[4:]
    assert all(a >= b for a, b in itertools.pairwise(falling))


def test_halfway() -> None:
    assert rate_factor(27, steps=50, schedule=SCHEDULES[1]) == pytest.approx(0.6)
    assert rate_factor(27, steps=50, schedule=SCHEDULES[2]) == pytest.approx(0.6)
    assert rate_factor(39, steps=50, schedule=SCHEDULES[3]) == 1.0
    assert rate_factor(45, steps=50, schedule=SCHEDULES[3]) == pytest.approx(0.6)


@given(
    st.sampled_from(SCHEDULES),
    st.integers(1, 30),
    st.integers(0, 60),
)
def test_always_a_fraction_also_for_runs_shorter_than_the_warm_up(
    schedule: ScheduleSection, steps: int, step: int
) -> None:
    assert 0.0 < rate_factor(step, steps=steps, schedule=schedule) <= 1.0


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.kind)
def test_a_warm_up_may_be_a_share_of_the_steps(schedule: ScheduleSection) -> None:
    share = schedule.model_copy(update={"warmup_steps": 0, "warmup_fraction": 0.075})
    for step in range(51):
        wanted = rate_factor(step, steps=50, schedule=schedule)
        assert rate_factor(step, steps=50, schedule=share) == wanted, "4 = 0.075 x 50 rounded up"
