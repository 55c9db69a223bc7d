"""Learning-rate schedules: pure functions of the optimizer step, never of the number of workers."""

from __future__ import annotations

import math

from shoal.config.optimizers import (
    Constant,
    Cosine,
    Linear,
    ScheduleSection,
    WarmupStableDecay,
)


def rate_factor(step: int, *, steps: int, schedule: ScheduleSection) -> float:
    """Factor on the peak rate for optimizer step `step` (from 0) of `steps`.

    Warm-up rises in a straight line and reaches 1 at its end; what follows spans the
    remaining steps, so that the last step comes close to, and the one after it would reach,
    `final_fraction`.
    """
    warmup = schedule.num_warmup_steps(steps=steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if isinstance(schedule, Constant):
        return 1.0
    if isinstance(schedule, WarmupStableDecay):
        first = steps - schedule.decay_steps
        progress = max(0.0, (step - first) / schedule.decay_steps)
        return 1.0 + (schedule.final_fraction - 1.0) * min(1.0, progress)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if isinstance(schedule, Linear):
        return 1.0 + (schedule.final_fraction - 1.0) * progress
    assert isinstance(schedule, Cosine), f"a schedule without a rule: {schedule!r}"
    wave = 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.final_fraction + (1.0 - schedule.final_fraction) * wave
