"""The best plan on a measured machine: which workers, how many, threads, micro batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from shoal.errors import UserError
from shoal.plan.calibrate import crews, estimator_for
from shoal.plan.cost.step import Estimator, Prediction
from shoal.plan.measurements import Measurements
from shoal.plan.search import Found, Space, divisors, find, ranked
from shoal.plan.workload import Crew, Workload

_ALIKE = 1.02


def find_here(
    measured: Measurements,
    *,
    workload: Workload,
    space: Space | None = None,
    among: Iterable[Crew] | None = None,
) -> Found:
    """The fastest plan over all crews of the machine; families are crews here.

    Of micro batches whose times come within 2 % the smallest is taken: the model cannot tell
    them apart, and memory can. Raises UserError when no crew can run it, with the reason of the
    last one tried.
    """
    space = space or Space()
    every: list[tuple[str, Prediction]] = []
    examined = 0
    refusal: UserError | None = None
    for crew in crews(measured) if among is None else among:
        estimator = estimator_for(measured, crew, workload=workload)
        try:
            found = find(estimator, space=space, runners_up=64)
        except UserError as error:
            refusal = error
            continue
        examined += found.examined
        every += [
            (str(crew), _with_crew(_smallest(each, estimator=estimator, space=space), crew))
            for each in (found.best, *found.runners_up)
        ]
    if not every:
        raise refusal or UserError("there are no workers to plan for")
    return ranked(every, examined=examined)


def _smallest(plan: Prediction, *, estimator: Estimator, space: Space) -> Prediction:
    """`plan`, with the smallest micro batch of `space` that takes no more than 2 % longer."""
    most = plan.candidate.micro_batch_samples
    for micro in divisors(most):
        if micro == most or not space.allows("micro_batch_samples", value=micro):
            continue
        tried = estimator.predict(replace(plan.candidate, micro_batch_samples=micro))
        if tried.step_seconds <= _ALIKE * plan.step_seconds:
            return tried
    return plan


def _with_crew(prediction: Prediction, crew: Crew) -> Prediction:
    return replace(prediction, candidate=replace(prediction.candidate, crew=crew))
