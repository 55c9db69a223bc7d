"""Times a recipe on this machine, in workers: which number formats pay, and the planner's best.

One job of as many processes as the largest candidate has. Rank 0 times lone workers and replicas
as threads while the others wait; then all time replicas as processes. What is timed is forward
and backward on the first rows of the real data; the reduction and the update are the planner's.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shoal.comm.group import Group, ProcessGroup
from shoal.config.recipe import Recipe
from shoal.data.batch import micro_batches
from shoal.data.stream import Stream
from shoal.engine.prepare import Inputs
from shoal.engine.step import Batch
from shoal.engine.timing import Clock, Subject, Threads, alone
from shoal.engine.worker import report_failure as tell
from shoal.layout import Share
from shoal.observe.events import Report
from shoal.parallel.model import model_config
from shoal.plan.calibrate import WORTH_IT
from shoal.plan.workload import Crew
from shoal.runtime import WorkerInfo, start_process_group, start_worker, stop_process_group
from shoal.tasks.kinds import create

_PEAK_SECONDS = 0.1
"""After so long no further product is timed."""


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of one measuring worker; rank 0 reports `measured`."""
    report = Report(descriptor)
    rank, size = payload["rank"], payload["size"]
    try:
        recipe = Recipe.model_validate(payload["recipe"])
        start_worker(WorkerInfo(rank, size, torch.device("cpu"), 1), seed=recipe.seed)
        if size > 1:
            start_process_group(
                rank=rank,
                size=size,
                device=torch.device("cpu"),
                meeting=Path(payload["store"]).as_uri(),
                timeout_seconds=300,
            )
        try:
            found = _Trial(recipe, payload=payload).seconds(ProcessGroup())
            if rank == 0:
                report.say("measured", seconds=found)
        finally:
            stop_process_group()
    except BaseException as error:
        return tell(error, report=report, rank=rank)
    return 0


def run_formats(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of a lone worker that reports what `measured_formats` finds."""
    report = Report(descriptor)
    try:
        start_worker(WorkerInfo(0, 1, torch.device("cpu"), payload["threads"]), seed=0)
        report.say("measured", **measured_formats(payload["device"]))
    except BaseException as error:
        return tell(error, report=report, rank=0)
    return 0


def measured_formats(wanted: str) -> dict[str, Any]:
    """Devices of the kind `wanted` (auto, cpu, cuda), and the peak of each number format.

    `peaks`: FLOPs per second of a large square product on one device, or on this thread count;
    `format_ratio`: bfloat16's over float32's; `device_name`: as its driver calls it.
    """
    devices = torch.cuda.device_count() if wanted != "cpu" else 0
    device = torch.device("cuda") if devices else None
    peaks = {name: _peak(getattr(torch, name), device) for name in ("float32", "bfloat16")}
    ratio = peaks["bfloat16"] / peaks["float32"]
    if devices and not torch.cuda.is_bf16_supported():
        ratio = 0.0
    return {
        "devices": devices,
        "device_name": torch.cuda.get_device_name() if devices else None,
        "format_ratio": ratio,
        "compute": "bfloat16" if ratio >= WORTH_IT else "float32",
        "peaks": peaks,
    }


def _peak(dtype: torch.dtype, device: torch.device | None) -> float:
    """FLOPs per second of the best of six products, of a size that fills the processor.

    The first warms up, and loads libraries on a device; of an emulated format a second is enough.
    """
    size = 512 if device is None else 4096
    a = torch.full((size, size), 0.01, dtype=dtype, device=device)
    tries: list[float] = []
    while len(tries) < 6 and sum(tries[1:]) < _PEAK_SECONDS:
        _wait(device)
        began = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        tries.append(time.perf_counter() - began)
    return 2.0 * size**3 / min(tries)


def _wait(device: torch.device | None) -> None:
    if device is not None:
        torch.cuda.synchronize(device)


class _Trial:
    """Candidates of one recipe: pairs of a crew and a micro batch, computed `turns` times each."""

    def __init__(self, recipe: Recipe, *, payload: dict[str, Any]) -> None:
        self._recipe, self._compute = recipe, payload["compute"]
        self._turns: int = payload["turns"]
        self._inputs = Inputs.from_json(payload["inputs"])
        self._task = create(
            recipe.task.kind, settings=self._inputs.task_settings, options=recipe.task
        )
        self._candidates = [(Crew(**crew), micro) for crew, micro in payload["candidates"]]
        stream = Stream(
            Path(self._inputs.data_directory),
            seed=recipe.seed,
            global_batch_samples=recipe.train.global_batch_samples,
        )
        most = max(micro for _, micro in self._candidates)
        arrays = stream.at(0, Share(0, most))
        self._batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self._subjects: list[Subject] = []
        self._crowds: dict[Crew, Threads] = {}

    def _subject(self, index: int) -> Subject:
        """Replica `index` of this process; built once."""
        while len(self._subjects) <= index:
            config = model_config(
                self._recipe.model,
                vocabulary_size=self._inputs.vocabulary_size,
                directory=self._inputs.model_directory,
                task_settings=self._task.model_settings(),
            )
            dropout = self._recipe.model.dropout
            subject = Subject(config, task=self._task, compute=self._compute, dropout=dropout)
            self._subjects.append(subject)
        return self._subjects[index]

    def seconds(self, group: Group) -> list[float]:
        """Seconds of a micro batch of each candidate, in their order (rank 0 knows them all).

        In turns, so that a slower moment of the machine hits all of them; the first turn warms up
        and does not count, and the quickest of the others is the least disturbed.
        """
        turns = [
            [self._once(crew, micro, group) for crew, micro in self._candidates]
            for _ in range(self._turns)
        ]
        return [min(each) for each in zip(*turns[1:], strict=True)]

    def _once(self, crew: Crew, micro: int, group: Group) -> float:
        part, _ = micro_batches(self._batch, self._task.fields, rows=micro)[0]
        shared = crew.count > 1 and crew.workers == "processes"
        if group.rank and not shared:
            return 0.0
        if crew.count > 1 and crew.workers == "threads":
            return self._threads(crew, part)
        torch.set_num_threads(crew.threads)
        return Clock(group if shared else alone()).once(partial(self._subject(0), part))

    def _threads(self, crew: Crew, part: Batch) -> float:
        subjects = [self._subject(index) for index in range(crew.count)]

        def body(group: Group) -> float:
            return Clock(group).once(partial(subjects[group.rank], part))

        if crew not in self._crowds:
            self._crowds[crew] = Threads(crew.count, threads_each=crew.threads)
        seconds: float = self._crowds[crew].run(body)[0]
        return seconds
