"""Times this machine for one recipe, in workers: number formats, kinds of worker, micro batches.

One job of as many processes as there are cores. Rank 0 first times a lone worker with all cores
and replicas as threads while the others wait; then all time replicas as processes. What is timed
is forward and backward on the first rows of the real data, until the slowest replica is done; the
reduction and the update, which take a few percent of a step, are not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shoal.comm.group import Group, ProcessGroup
from shoal.comm.messages import broadcast_json
from shoal.comm.threads import Meeting, ThreadGroup
from shoal.config.recipe import Recipe
from shoal.data.stream import Stream
from shoal.engine.model import model_config
from shoal.engine.prepare import Inputs
from shoal.engine.step import Batch, micro_batches
from shoal.engine.worker import tell
from shoal.layout import Share
from shoal.models import init
from shoal.models.anatomy import anatomy_of, check_logits
from shoal.models.huggingface import build_meta
from shoal.observe.events import Report
from shoal.parallel.loss import chunked_loss
from shoal.parallel.precision import DTYPES, compute_context
from shoal.runtime import Place, start_process_group, start_worker, stop_process_group
from shoal.tasks.kinds import create

WORTH_IT = 1.15
"""bfloat16 is chosen when its matrix products are at least this much faster than float32's."""


Subject = Callable[[Batch], None]
"""One replica to be timed: forward and backward of a micro batch."""


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of one measuring worker; rank 0 reports `measured`."""
    report = Report(descriptor)
    try:
        _measure(payload, report=report)
    except BaseException as error:
        return tell(error, report=report, rank=payload["rank"])
    return 0


def _measure(payload: dict[str, Any], *, report: Report) -> None:
    rank, size = payload["rank"], payload["size"]
    recipe = Recipe.model_validate(payload["recipe"])
    inputs = Inputs.from_json(payload["inputs"])
    start_worker(Place(rank, size, torch.device("cpu"), size), seed=recipe.seed)
    if size > 1:
        start_process_group(
            rank=rank,
            size=size,
            device=torch.device("cpu"),
            store=Path(payload["store"]),
            timeout_seconds=300,
        )
    group = ProcessGroup()
    try:
        # with devices there is one process per device: only the number format is open
        accelerated = recipe.launch.device != "cpu" and torch.cuda.is_available()
        results = (
            measured_format(recipe)
            if accelerated
            else _all(recipe, inputs, group=group, wanted=payload["wanted"])
        )
        if rank == 0:
            report.say("measured", **results)
    finally:
        stop_process_group()


def measured_format(recipe: Recipe) -> dict[str, Any]:
    """The number format for this machine, and how many devices it has; no `rows` yet."""
    devices = torch.cuda.device_count() if recipe.launch.device != "cpu" else 0
    ratio = format_ratio(torch.device("cuda") if devices else None)
    compute = recipe.precision.compute
    if compute == "auto":
        known = not devices or torch.cuda.is_bf16_supported()
        compute = "bfloat16" if known and ratio >= WORTH_IT else "float32"
    return {"rows": [], "compute": compute, "format_ratio": ratio, "devices": devices}


def format_ratio(device: torch.device | None = None) -> float:
    """How many times faster bfloat16 matrix products are than float32 ones, on this machine.

    1.0 where the processor has no instructions for them (emulation is slower, never faster).
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        size = 512 if device is None else 4096
        a = torch.full((size, size), 0.01, dtype=dtype, device=device)
        b = torch.full((size, size), 0.01, dtype=dtype, device=device)
        torch.mm(a, b)
        tries = []
        for _ in range(5):
            _wait(device)
            began = time.perf_counter()
            torch.mm(a, b)
            _wait(device)
            tries.append(time.perf_counter() - began)
        seconds[dtype] = min(tries)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _wait(device: torch.device | None) -> None:
    if device is not None:
        torch.cuda.synchronize(device)


def _all(
    recipe: Recipe, inputs: Inputs, *, group: ProcessGroup, wanted: dict[str, Any]
) -> dict[str, Any]:
    found = broadcast_json(group, measured_format(recipe) if group.rank == 0 else None)
    compute = found["compute"]
    if not wanted["solo"] and not wanted["replicas"]:
        return found
    stream = Stream(
        Path(inputs.data_directory),
        seed=recipe.seed,
        global_batch_samples=recipe.train.global_batch_samples,
    )
    most = max([*wanted["solo"], *wanted["replicas"], 1])
    arrays = stream.at(0, Share(0, most))
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    subject = _subject(recipe, inputs, compute=compute)
    rows: list[dict[str, Any]] = []
    size = group.size
    if group.rank == 0:
        for micro in wanted["solo"]:
            rows.append(_row("solo", 1, size, micro, _time(subject, batch, micro=micro)))
        torch.set_num_threads(1)
        if size > 1:
            others = [_subject(recipe, inputs, compute=compute) for _ in range(size - 1)]
            subjects = [subject, *others]
            for micro in wanted["replicas"]:
                seconds = _time_threads(subjects, batch, micro=micro)
                rows.append(_row("threads", size, 1, micro, seconds))
    torch.set_num_threads(1)
    group.barrier()
    if size > 1:
        best = _best_micro(rows, wanted["replicas"], group=group)
        seconds = _time(subject, batch, micro=best, group=group)
        rows.append(_row("processes", size, 1, best, seconds))
    return {**found, "rows": rows}


def _best_micro(rows: list[dict[str, Any]], sizes: list[int], *, group: Group) -> int:
    """Processes are timed at the micro batch that was best for threads."""
    choice = torch.zeros(1, dtype=torch.int64)
    if group.rank == 0:
        threads = [row for row in rows if row["workers"] == "threads"]
        choice[0] = max(threads, key=lambda r: r["samples_per_second"])["micro_batch_samples"]
    group.broadcast_(choice)
    return int(choice.item()) or sizes[0]


def _row(kind: str, replicate: int, threads: int, micro: int, seconds: float) -> dict[str, Any]:
    return {
        "workers": kind,
        "replicate": replicate,
        "threads_per_worker": threads,
        "micro_batch_samples": micro,
        "samples_per_second": replicate * micro / seconds,
    }


def _subject(recipe: Recipe, inputs: Inputs, *, compute: str) -> Subject:
    task = create(recipe.task.kind, settings=inputs.task_settings)
    config = model_config(recipe, inputs=inputs, task=task)
    model = build_meta(config, auto_class=task.auto_class, dropout=recipe.model.dropout)
    # The values do not matter for the time; zeros would (denormals do not, constants are fine).
    init.materialise(model, record=init.record(model), seed=recipe.seed)
    anatomy = check_logits(model, anatomy_of(model))
    model.train()
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


def _time(
    subject: Subject, batch: Batch, *, micro: int, group: Group | None = None, repeats: int = 2
) -> float:
    """Seconds of one micro batch (the slowest replica's): the best of `repeats`, warmed up."""
    part, _ = micro_batches(batch, size=micro)[0]
    subject(part)
    tries = []
    for _ in range(repeats):
        if group is not None:
            group.barrier()
        began = time.perf_counter()
        subject(part)
        if group is not None:
            group.barrier()
        tries.append(time.perf_counter() - began)
    return min(tries)


def _time_threads(subjects: list[Subject], batch: Batch, *, micro: int) -> float:
    meeting = Meeting(len(subjects), timeout_seconds=120)
    seconds = [0.0] * len(subjects)

    def body(rank: int) -> None:
        torch.set_num_threads(1)
        group = ThreadGroup(meeting, rank=rank)
        try:
            seconds[rank] = _time(subjects[rank], batch, micro=micro, group=group)
        except BaseException as error:
            meeting.fail(str(error))
            raise

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(len(subjects))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(seconds)
