"""When a run ends early: at which step, for which losses, and not for which."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from typing import Any

import pytest

from shoal.config.recipe import TrainSection
from shoal.engine.ending import Ending, Watch


def watch(*, alone: bool = False, keep_best: bool = True, **train: Any) -> Watch:
    section = TrainSection(steps=1000, **{"divergence_steps": 5, **train})
    return Watch(section, keep_best=keep_best, alone=alone)


def ended_at(watching: Watch, losses: Iterable[float]) -> int | None:
    """The first step at which the run ends."""
    for step, loss in enumerate(losses, 1):
        watching.stepped(step, loss, applied=math.isfinite(loss))
        if watching.ending is not None:
            return step
    return None


FALLING = [5.7, 5.6, 5.4, 5.2, 5.0, 4.8]


@pytest.mark.parametrize(
    ("losses", "at"),
    [
        ([*FALLING, 115.0, 318.0, 70.0, 20.0, 44.0, 51.0], 11),
        (FALLING + [math.nan] * 6, 11),
        ([*FALLING, 6.0, math.nan, math.inf, 6.1, 5.8], 11),
        ([5.7, 8.0, 25.0, 80.0, 110.0, 70.0, 300.0, 40.0], 7),  # from step 3: 1.5 x the first
        ([math.nan] * 5, 5),
        (FALLING + [6.0] * 4 + [5.0] + [6.0] * 4, None),  # never five in a row
        (FALLING + [5.69] * 40, None),
    ],
)
def test_a_loss_that_stays_above_its_start_ends_the_run(
    losses: list[float], at: int | None
) -> None:
    assert ended_at(watch(), losses) == at


@pytest.mark.parametrize("first", [1.85, 2.0, 0.01])
def test_noise_about_a_loss_that_does_not_fall_is_no_divergence(first: float) -> None:
    """Fine-tuning a good model: the first batch may have been an easy one."""
    draw = random.Random(1)
    middle = 2.0 if first > 1 else 0.01
    losses = [first, *(max(0.0, draw.gauss(middle, 0.2 * middle)) for _ in range(5000))]
    assert ended_at(watch(divergence_steps=50), losses) is None


def test_gradients_that_are_never_finite_end_it_too() -> None:
    watching = watch()
    for step in range(1, 6):
        watching.stepped(step, 2.0, applied=False)
    assert watching.ending is not None and watching.ending.kind == "diverged"


def test_what_is_said_of_it() -> None:
    watching = watch()
    ended_at(watching, FALLING + [6.0] * 5)
    assert watching.ending == Ending(
        "diverged",
        "the loss has been above its start (5.7) or not finite for 5 steps (from step 7); at step "
        "11 it is 6",
    )
    assert not watching.ending.is_success


@pytest.mark.parametrize("kind", ["warn", "ignore"])
def test_it_may_only_be_said_or_not_even_that(kind: str) -> None:
    watching, said = watch(on_divergence=kind), 0
    for step, loss in enumerate(FALLING + [9.0] * 20 + [5.0] + [9.0] * 20, 1):
        watching.stepped(step, loss, applied=True)
        said += watching.begins_to_diverge is not None
        assert watching.ending is None
    assert said == (2 if kind == "warn" else 0), "once for each time"


def test_replicas_that_step_alone_end_when_they_agree() -> None:
    watching = watch(alone=True)
    assert ended_at(watching, FALLING + [9.0] * 8) is None and watching.diverges
    watching.agree(True)
    assert watching.ending is not None
    other = watch(alone=True)  # its own losses are well
    ended_at(other, FALLING)
    other.agree(True)
    assert other.ending is not None and other.ending.kind == "diverged"


@pytest.mark.parametrize("stop", range(1, 12))
def test_it_goes_on_where_it_stood(stop: int) -> None:
    """The state travels as JSON, to a rank that joins and into a checkpoint."""
    losses = FALLING + [6.0] * 5
    first = watch()
    assert ended_at(first, losses[: stop - 1]) is None
    second = watch()
    second.restore(json.loads(json.dumps(first.state())))
    for step, loss in enumerate(losses[stop - 1 :], stop):
        assert second.ending is None
        second.stepped(step, loss, applied=True)
    assert second.ending is not None


def test_an_older_checkpoint_has_no_state() -> None:
    watching = watch()
    watching.restore({})
    assert ended_at(watching, FALLING) is None and watching.best is None


def test_until_a_loss_is_reached() -> None:
    watching = watch(until={"evaluation_loss": 4.0})
    for step, loss in ((10, 4.5), (20, 4.01)):
        watching.evaluated(step, loss)
        assert watching.ending is None
    watching.evaluated(30, 4.0)
    assert watching.ending is not None and watching.ending.is_success
    assert watching.ending.kind == "reached"


def test_until_nothing_gets_better() -> None:
    watching = watch(until={"patience": 2})
    for step, loss in ((10, 4.5), (20, 4.6), (30, 4.4), (40, 4.4)):
        watching.evaluated(step, loss)
        assert watching.ending is None
    watching.evaluated(40, 4.4)  # the same again, after a loss: it counts once
    assert watching.ending is None
    watching.evaluated(50, math.nan)
    assert watching.ending == Ending(
        "no-progress", "2 evaluations in a row were no better than 4.4 at step 30"
    )
    assert watching.best == 30 and watch(keep_best=False).best is None
