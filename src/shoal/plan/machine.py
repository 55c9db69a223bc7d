"""The best plan on a measured machine: which workers, how many, threads, micro batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from shoal.errors import UserError
from shoal.plan.calibrate import crews, estimator_for
from shoal.plan.cost.step import Prediction
from shoal.plan.measurements import Measurements
from shoal.plan.search import Found, Space, find, ranked
from shoal.plan.workload import Crew, Workload


def find_here(
    measured: Measurements,
    *,
    workload: Workload,
    space: Space | None = None,
    among: Iterable[Crew] | None = None,
) -> Found:
    """The fastest plan over all crews of the machine; families are crews here.

    Raises UserError when no crew can run it, with the reason of the largest.
    """
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
        every += [(str(crew), _by(crew, each)) for each in (found.best, *found.runners_up)]
    if not every:
        raise refusal or UserError("there are no workers to plan for")
    return ranked(every, examined=examined)


def _by(crew: Crew, prediction: Prediction) -> Prediction:
    return replace(prediction, candidate=replace(prediction.candidate, crew=crew))
