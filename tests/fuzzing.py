"""Many small models in one set of workers: the curve of three steps of each, in one layout.

`run` is what each worker does: for every case it builds what a run builds, takes three steps of
the trainer's own parts, and rank 0 reports losses and gradient norms. A worker alone also reports
the loss that transformers gives in float64 for the first batch. A case that cannot run reports why.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import seq2seq
from shoal.comm.group import ProcessGroup
from shoal.engine import build
from shoal.engine.job import Job
from shoal.engine.step import Votes
from shoal.engine.training import Training
from shoal.engine.worker import report_failure
from shoal.fields import IGNORED
from shoal.models.anatomy import canonical_parameters
from shoal.models.huggingface import build_reference
from shoal.observe.events import Report
from shoal.parallel.oracle import documents_of
from shoal.parallel.ranks import meet
from shoal.runtime import WorkerInfo, start_process_group, start_worker, stop_process_group
from shoal.tasks.kinds import create
from shoal.tasks.task import Batch, Task


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of one worker of `size`; `cases`: [{job, task, micros, held}].

    `ends`: with the first case that cannot run; else the next one follows. `micros`: the size of
    micro batches at each step; `held`: beside transformers.
    """
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
            tasks = {seq2seq.Seq2Seq.kind: seq2seq.create_task}
            build.create_task = tasks.get(case["task"], create)
            try:
                found = curve(case, worker, report)
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
            if rank == 0 or "error" in found:
                report.say("curve", number=number, **found)
            if "error" in found and payload.get("ends"):
                return 1  # the others may be waiting for this one
        stop_process_group()
    except BaseException as error:
        return report_failure(error, report=report, rank=rank)
    return 0


def curve(case: dict[str, Any], worker: WorkerInfo, report: Report) -> dict[str, Any]:
    """Losses and gradient norms of as many steps as there are sizes of micro batches."""
    job, micros = Job.from_json(case["job"]), case["micros"]
    ranks = meet(ProcessGroup(), layout=job.decision.layout, device=worker.device)
    training = build.build(job, ranks=ranks, worker=worker, report=report)
    references = references_of(training, micro=micros[0]) if case["held"] else {}
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
    return {"losses": losses, "norms": norms, **references}


@torch.no_grad()
def references_of(training: Training, *, micro: int) -> dict[str, float]:
    """The loss of the first batch in micro batches, and what transformers gives a user for it.

    Theirs: the same weights in float64, eager attention; documents of packed rows are called as
    rows of their own, padded. Neither drops anything. The last token of a document that was cut has
    a target in shoal alone, which is left out.
    """
    task, model = training.task, training.model
    batch = training.batches(0, training.share())
    if task.causal:
        documents = batch["document_ids"]
        ends = documents != documents.roll(-1, dims=1)
        ends[:, -1] = True
        batch["labels"] = batch["labels"].masked_fill(ends, IGNORED)
    model.eval()
    total = 0.0
    for rows in zip(*(each.split(micro) for each in batch.values())):
        total += float(task.output(model, training.anatomy, dict(zip(batch, rows))).total())
    model.train()
    theirs = build_reference(model.config, auto_class=task.auto_class)
    theirs.config._experts_implementation = "eager"  # the others have no float64
    ours = canonical_parameters(model)
    for name, weight in canonical_parameters(theirs).items():
        weight.copy_(ours[name])
    if training.job.recipe.data.packing:
        batch = alone(batch)
    try:
        wanted = users_loss(theirs.double(), task=task, batch=batch)
    except RuntimeError:  # masks that know float32 only
        wanted = users_loss(theirs.float(), task=task, batch=batch)
    return {"first_loss": total / task.count(batch), "reference": wanted}


def users_loss(model: nn.Module, *, task: Task, batch: Batch) -> float:
    """Mean over targets, as transformers gives it; row by row where it has no number for all.

    That is where padding is longer than a window.
    """
    loss = float(model(**task.user_call(batch)).loss)
    if math.isfinite(loss) or "document_ids" not in batch:
        return loss
    rows = [one for _, _, one in documents_of(dict(batch)) if task.count(one)]
    losses = [float(model(**task.user_call(one)).loss) * task.count(one) for one in rows]
    return sum(losses) / task.count(batch)


def alone(batch: Batch) -> Batch:
    """Each document of a batch in a row of its own."""
    documents = [one for _, _, one in documents_of(dict(batch))]
    fills = {"labels": IGNORED, "document_ids": -1}
    return {
        name: torch.cat([each[name] for each in documents])
        if value.dim() == 1
        else pad_sequence(
            [each[name][0] for each in documents],
            batch_first=True,
            padding_value=fills.get(name, 0),
        )
        for name, value in documents[0].items()
    }
