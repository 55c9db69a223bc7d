"""Many small models in one set of workers: the curve of three steps of each, in one layout.

`run` is what each worker does: for every case it builds what a run builds, takes three steps of
the trainer's own parts, and rank 0 reports losses and gradient norms. A case that cannot run
reports why.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from shoal.comm.group import ProcessGroup
from shoal.engine.build import build
from shoal.engine.job import Job
from shoal.engine.step import Votes
from shoal.engine.worker import report_failure
from shoal.observe.events import Report
from shoal.parallel.ranks import meet
from shoal.runtime import WorkerInfo, start_process_group, start_worker, stop_process_group


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of one worker of `size`; `cases`: [{job, micros}], one micro batch per step."""
    report, rank, size = Report(descriptor), payload["rank"], payload["size"]
    worker = WorkerInfo(rank, size, torch.device("cpu"), 1)
    warnings.simplefilter("ignore")
    try:
        start_worker(worker, seed=0)
        if size > 1:
            start_process_group(
                rank=rank,
                size=size,
                device=worker.device,
                meeting=(Path(payload["folder"]) / "meeting").as_uri(),
                timeout_seconds=120.0,
            )
        for number, case in enumerate(payload["cases"]):
            try:
                found = curve(Job.from_json(case["job"]), case["micros"], worker, report)
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            if rank == 0:
                report.say("curve", number=number, **found)
        stop_process_group()
    except BaseException as error:
        return report_failure(error, report=report, rank=rank)
    return 0


def curve(job: Job, micros: list[int], worker: WorkerInfo, report: Report) -> dict[str, Any]:
    """Losses and gradient norms of as many steps as there are micro batches."""
    ranks = meet(ProcessGroup(), layout=job.decision.layout, device=worker.device)
    training = build(job, ranks=ranks, worker=worker, report=report)
    losses, norms = [], []
    for number, micro in enumerate(micros):
        step, share = training.step.in_micro_batches_of(micro), training.share()
        training.policy.before_step(number)
        batch = training.batches(number, share)
        counted = step.count(batch, votes=Votes())
        result = step.train(batch, share=share, counted=counted, step=number)
        outcome = training.update.apply(result)
        training.policy.after_step(number, targets=result.targets)
        losses.append(result.loss)
        norms.append(outcome.gradient_norm)
    return {"losses": losses, "norms": norms}
