"""Times calls while all workers of a group make the same ones; shared by both measurements."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shoal.comm.group import Group
from shoal.comm.threads import Meeting, ThreadGroup
from shoal.engine.step import Batch
from shoal.models import init
from shoal.models.anatomy import anatomy_of, check_logits
from shoal.models.huggingface import build_meta
from shoal.parallel.loss import chunked_loss
from shoal.parallel.precision import DTYPES, compute_context
from shoal.tasks.outcome import Task

Subject = Callable[[Batch], None]
"""One replica to be timed: forward and backward of a micro batch."""

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
        self.group.barrier()
        began = time.perf_counter()
        call()
        first = self._mean(time.perf_counter() - began)
        inner = max(1, min(1000, round(_SHORT_SECONDS / first)))
        readings = 1 if first > 0.3 else 2 if first > 0.1 else 3
        return self._mean(statistics.median(self._read(call, inner) for _ in range(readings)))

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


def in_threads(
    count: int, body: Callable[[Group], object], *, threads_each: int, timeout_seconds: float = 300
) -> list[Any]:
    """What `body` gives in each of `count` threads of one group, in rank order."""
    meeting = Meeting(count, timeout_seconds=timeout_seconds)
    results: list[Any] = [None] * count
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        torch.set_num_threads(threads_each)
        try:
            results[rank] = body(ThreadGroup(meeting, rank=rank))
        except BaseException as error:
            failures.append(error)
            meeting.fail(str(error))

    workers = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]
    return results


def subject_of(config: Any, *, task: Task, compute: str, dropout: str = "off") -> Subject:
    """A replica of the model of `config` with gradients to add to, as a run has them."""
    model = build_meta(config, auto_class=task.auto_class, dropout=dropout)
    # The values do not matter for the time; zeros would (denormals do not, constants are fine).
    init.materialise(model, record=init.record(model), seed=0)
    anatomy = check_logits(model, anatomy_of(model))
    model.train()
    _give_gradients(model)
    device = torch.device("cpu")

    def step(batch: Batch) -> None:
        with compute_context(DTYPES[compute], device=device):
            output = task.forward(model, anatomy=anatomy, batch=batch, step=0)
            loss = chunked_loss(
                output.hidden,
                labels=output.labels,
                logits_of=output.logits_of,
                head_parameters=output.head_parameters,
            )
        loss.backward()

    return step


def _give_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
