"""Times calls while all workers of a group make the same ones; shared by both measurements."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch

from shoal.comm.group import Group
from shoal.comm.threads import Meeting, ThreadGroup
from shoal.engine.step import Batch
from shoal.errors import WorkerError
from shoal.models import init
from shoal.models.anatomy import anatomy_of, check_logits
from shoal.models.huggingface import build_meta
from shoal.parallel.precision import DTYPES, compute_context
from shoal.tasks.task import Task

_SHORT_SECONDS = 0.004
"""Calls are repeated until a reading takes so long: a clock's own cost then does not count."""


@dataclass(frozen=True)
class Clock:
    """Times one call on every rank of `group` at once; all ranks get the same answer."""

    group: Group

    def seconds(self, call: Callable[[], object]) -> float:
        """Seconds of one call, warmed up: the median of one to three readings, averaged over ranks.

        The shorter a call, the more often it is read: interruptions are as long for all.
        """
        first = self.once(call)
        inner = max(1, min(1000, round(_SHORT_SECONDS / first)))
        readings = 1 if first > 0.2 else 2 if first > 0.05 else 3
        return self._mean(statistics.median(self._read(call, inner) for _ in range(readings)))

    def once(self, call: Callable[[], object]) -> float:
        """Seconds of this one call, averaged over the ranks."""
        return self._mean(self._read(call, 1))

    def _read(self, call: Callable[[], object], inner: int) -> float:
        self.group.barrier()
        began = time.perf_counter()
        for _ in range(inner):
            call()
        return (time.perf_counter() - began) / inner

    def _mean(self, seconds: float) -> float:
        whole = torch.tensor([seconds], dtype=torch.float64)
        self.group.sum_(whole)
        return float(whole.item()) / self.group.size


def alone() -> Group:
    """A group of one, whatever other workers there are."""
    return ThreadGroup(Meeting(1, timeout_seconds=60), rank=0)


class Threads:
    """`count` threads that stay, each with `threads_each` threads of its own for its operations.

    A thread that is made anew has to fetch its memory from the system again.
    """

    def __init__(self, count: int, *, threads_each: int, timeout_seconds: float = 300) -> None:
        self._count, self._timeout_seconds = count, timeout_seconds
        self._threads = ThreadPoolExecutor(
            count, initializer=torch.set_num_threads, initargs=(threads_each,)
        )

    def run(self, body: Callable[[Group], Any]) -> list[Any]:
        """What `body` gives for each rank of one group of them all, in rank order."""
        meeting = Meeting(self._count, timeout_seconds=self._timeout_seconds)

        def guarded(rank: int) -> Any:
            try:
                return body(ThreadGroup(meeting, rank=rank))
            except BaseException as error:
                meeting.fail(str(error))
                raise

        ranks = [self._threads.submit(guarded, rank) for rank in range(self._count)]
        wait(ranks)
        failures = [error for each in ranks if (error := each.exception()) is not None]
        if failures:  # a broken meeting is what the others saw of it
            raise next((e for e in failures if not isinstance(e, WorkerError)), failures[0])
        return [each.result() for each in ranks]


class Subject:
    """One replica to be timed: forward and backward of a micro batch, gradients added up."""

    def __init__(self, config: Any, *, task: Task, compute: str, dropout: str = "off") -> None:
        self._model = build_meta(config, auto_class=task.auto_class, dropout=dropout)
        # The values do not matter for the time; zeros would (denormals do not, constants are fine).
        init.materialise(self._model, record=init.record(self._model), seed=0)
        self._anatomy = check_logits(self._model, anatomy_of(self._model))
        self._model.train()
        self._task, self._dtype = task, DTYPES[compute]
        for parameter in self._model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    @property
    def resident(self) -> list[torch.Tensor]:
        """Parameters and gradients."""
        found = list(self._model.parameters())
        return [*found, *(each.grad for each in found if each.grad is not None)]

    def __call__(self, batch: Batch) -> None:
        with compute_context(self._dtype, device=torch.device("cpu")):
            loss = self._task.output(self._model, self._anatomy, batch).total()
        loss.backward()  # type: ignore[no-untyped-call]
