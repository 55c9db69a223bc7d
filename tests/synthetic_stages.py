"""Stages that take a given time and compute nothing: what a schedule itself costs, on any machine.

`run` is what each worker of the pool does: the product's own schedules (parallel/schedules.py) over
stages whose forward, input gradients and weight gradients each sleep.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shoal.comm.group import Traffic
from shoal.observe.events import Report
from shoal.parallel.schedules import Line, Schedule
from shoal.parallel.stages import Stage, Stages
from shoal.plan.schedules import rank_of_stage
from shoal.runtime import start_process_group, stop_process_group


class Sleeps(torch.autograd.Function):
    """The same values; forward and backward take `seconds`."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, seconds: tuple[float, float]) -> Tensor:
        ctx.seconds = seconds[1]
        time.sleep(seconds[0])
        return given.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        time.sleep(ctx.seconds)
        return gradient, None


class Work:
    """What a rank's stages do (Compute of parallel/schedules.py), noted with times."""

    def __init__(self, weights: dict[Stage, nn.Parameter], *, seconds: float) -> None:
        """`seconds`: of one stage's forward, as of its input's and its weight's gradient."""
        self.parameters, self.seconds = weights, seconds
        self.busy = 0.0
        """Seconds that forwards and backwards took: a machine may wake late, and slowly."""
        self.held = self.most_held = 0
        self.events: list[tuple[str, int, int]] = []

    def forward(self, stage: Stage, hidden: Tensor | None, number: int) -> Tensor:
        self.held += 1
        self.most_held = max(self.held, self.most_held)
        self.events.append(("F", stage.number, number))
        with self._counted():
            return self._computed(stage, hidden)

    def _computed(self, stage: Stage, hidden: Tensor | None) -> Tensor:
        given = torch.zeros(1, 1, 1) if hidden is None else hidden
        each = self.seconds
        weight = Sleeps.apply(self.parameters[stage], (0.0, each))  # type: ignore[no-untyped-call]
        states: Tensor = Sleeps.apply(given, (each, each)) + weight  # type: ignore[no-untyped-call]
        if stage.is_first:  # nothing asks for the gradient of what was not received
            states = Sleeps.apply(states, (0.0, each))  # type: ignore[no-untyped-call]
        return states.sum() if stage.is_last else states

    def backward(self, stage: Stage, number: int) -> AbstractContextManager[None]:
        self.events.append(("B", stage.number, number))
        return self._counted()

    def weights(self, stage: Stage, number: int) -> AbstractContextManager[None]:
        return self._counted()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.busy += time.perf_counter() - began

    def after_backward(self, stage: Stage, number: int) -> None:
        self.held -= 1


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of one worker: seconds of a step, the most micro batches held, the order."""
    rank, ranks, each = payload["rank"], payload["ranks"], payload["stages_per_rank"]
    torch.set_num_threads(1)
    start_process_group(
        rank=rank,
        size=ranks,
        device=torch.device("cpu"),
        meeting=(Path(payload["out"]) / ".meeting").as_uri(),
        timeout_seconds=60,
    )
    count, name = ranks * each, payload["schedule"]
    every = tuple(Stage(at, count, at, at + 1) for at in range(count))
    places = tuple(rank_of_stage(name, stage=at, ranks=ranks) for at in range(count))
    stages = Stages(every, places, rank)
    weights = {stage: nn.Parameter(torch.zeros(1)) for stage in stages.own}
    assert dist.group.WORLD is not None
    schedule = Schedule(
        stages,
        line=Line(dist.group.WORLD, torch.device("cpu"), torch.float32, Traffic()),
        schedule=name,
        num_micro_batches=payload["micro_batches"],
        parameters=lambda stage: [weights[stage]],
    )
    shapes = [(1, 1, 1)] * payload["micro_batches"]
    seconds, busy = [], []
    for turn in range(payload["turns"] + 1):
        work = Work(weights, seconds=payload["seconds"] / each)
        dist.barrier()
        began = time.perf_counter()
        schedule.step(work, shapes=shapes)
        if turn:  # the first one makes connections
            seconds.append(time.perf_counter() - began)
            busy.append(work.busy)
    stop_process_group()
    found = {"rank": rank, "held": work.most_held, "events": work.events}
    Report(descriptor).say("timed", found={**found, "seconds": seconds, "busy": busy})
    return 0
