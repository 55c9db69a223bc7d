"""The training loop, in plain sight, and what is committed after each step."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shoal.comm.group import Group
from shoal.comm.messages import gather_json
from shoal.config.locked import LOCKED, changed
from shoal.config.recipe import Recipe
from shoal.engine.build import Training, build
from shoal.engine.decision import Decision
from shoal.engine.export import fingerprint_of, write_model
from shoal.engine.prepare import Inputs
from shoal.engine.saving import choose_checkpoint, load, save
from shoal.engine.step import Batch, StepResult
from shoal.engine.update import Outcome
from shoal.errors import RunError, Stopped
from shoal.layout import Share
from shoal.observe.events import Fan, Report, RunFiles, Sink, cut_after
from shoal.observe.memory import LiveStorage, private_bytes
from shoal.observe.trace import Trace, write_trace
from shoal.runtime import Place


@dataclass(frozen=True)
class Job:
    """Everything a worker needs to know."""

    recipe: Recipe
    run: Path
    inputs: Inputs
    decision: Decision
    resume: bool
    final_model: bool = True
    fault: str | None = None
    """A planned mistake, for showing that checks see it: `mean-of-means`."""
    score: str | None = None
    """Only evaluate, and write the scores to this file."""


def train(job: Job, *, group: Group, place: Place, report: Report, stop: threading.Event) -> None:
    """Train to the end of the recipe, or until asked to stop. Raises Stopped after saving."""
    Trainer(job, group=group, place=place, report=report, stop=stop).run()


class Trainer:
    """One rank's loop."""

    def __init__(
        self, job: Job, *, group: Group, place: Place, report: Report, stop: threading.Event
    ) -> None:
        self.job, self.group, self.place = job, group, place
        self._report, self._stop = report, stop
        self._first = group.rank == 0
        if self._first:
            report.say("phase", text="building the model")
        self.training: Training = build(job, group=group, place=place, report=report)
        self.sink: Sink = Fan([])
        self.trace = Trace(on=job.recipe.observe.trace, rank=group.rank)
        self._started = time.monotonic()
        self._step_began = time.perf_counter()
        self._evaluated_at = -1
        self._saved_at = -1

    # --- the loop

    def run(self) -> None:
        """Restore or start, then step until done."""
        training, sync = self.training, self.training.sync
        if self.job.score is not None:
            scores = training.evaluate()
            if self._first:
                Path(self.job.score).write_text(json.dumps(scores), encoding="utf-8")
            return
        self._start()
        if self._due(self.job.recipe.train.evaluate_every_steps, start=True):
            self._evaluate()
        while training.progress.step < self._last_step:
            step = training.progress.step
            self._step_began = time.perf_counter()
            sync.before_step(step)
            share = sync.share()
            with self.trace.span("batches", step=step):
                batch = training.batches(step, share)
            with self.trace.span("forward_backward", step=step):
                stop = self._stop.is_set()
                result = self._measured(batch, share=share, step=step, stop=stop)
            with self.trace.span("update", step=step):
                outcome = training.update.apply(result)
                sync.after_step(step)
            self._commit(outcome)
        self._finish()

    def _measured(self, batch: Batch, *, share: Share, step: int, stop: bool) -> StepResult:
        """Run the step; the first one of a run is counted storage by storage (DESIGN 5.9)."""
        training = self.training
        run = training.forward_backward.run
        if training.peak_memory_bytes is not None or self.place.device.type != "cpu":
            return run(batch, share=share, step=step, stop=stop)
        resident = training.resident()
        with LiveStorage(base_bytes=sum(tensor.nbytes for tensor in resident)) as live:
            live.ignore(resident)  # their views and updates in place are no new storage
            result = run(batch, share=share, step=step, stop=stop)
        training.peak_memory_bytes = live.peak_bytes
        return result

    # --- start

    def _start(self) -> None:
        job, training = self.job, self.training
        if self._first:
            self.sink = Fan([RunFiles(job.run), self._report])
        if job.resume:
            self._restore()
        if self._first:
            self.sink.close()  # what it had open may have been cut after the step restored
            self.sink = Fan([*_sinks(job), self._report])
            kind = "resumed" if job.resume else "started"
            self.sink.event(kind, {"step": training.progress.step, **_facts(job)})
            self._report.say("phase", text="the first step")

    def _restore(self) -> None:
        job, training = self.job, self.training
        step = choose_checkpoint(training.store, group=self.group, sink=self.sink)
        reader = training.store.open(step)
        _check_same_run(reader.state["recipe"], job.recipe.model_dump(mode="json"), at=job.run)
        load(reader, training.state, group=self.group)
        progress = training.progress
        for name in ("step", "applied_steps", "tokens", "samples", "seconds"):
            setattr(progress, name, reader.state["progress"][name])
        training.update.restore(progress.step, applied_steps=progress.applied_steps)
        states = reader.state["random_states"]
        if self.group.rank < len(states) and not self.group.shares_memory:
            raw = bytearray(bytes.fromhex(states[self.group.rank]))
            torch.set_rng_state(torch.frombuffer(raw, dtype=torch.uint8))
        self._saved_at = progress.step
        if self._first:
            dropped = cut_after(job.run / "metrics.jsonl", step=progress.step)
            cut_after(job.run / "samples.jsonl", step=progress.step - 1)  # counts from 0
            if dropped:
                self.sink.event("redone", {"step": progress.step, "rows": dropped})
        self.group.barrier()

    # --- after a step

    @property
    def _last_step(self) -> int:
        early = self.job.recipe.train.stop_after_steps
        return min(self.training.steps, early) if early else self.training.steps

    def _due(self, every: int, *, start: bool = False) -> bool:
        step = self.training.progress.step
        if start:
            return every > 0 and step == 0
        return every > 0 and (step % every == 0 or step == self._last_step)

    def _commit(self, outcome: Outcome) -> None:
        """The step counts from here on: rows, evaluation, checkpoint, in this order."""
        training, recipe = self.training, self.job.recipe
        progress = training.progress
        progress.step += 1
        progress.applied_steps += outcome.applied
        progress.tokens += outcome.targets
        progress.samples += recipe.train.global_batch_samples
        seconds = time.perf_counter() - self._step_began
        progress.seconds += seconds
        self._log(outcome, seconds)
        if not outcome.applied and self._first:
            why = "no targets" if outcome.targets == 0 else "gradients are not finite"
            self.sink.event("skipped", {"step": progress.step, "text": f"step skipped: {why}"})
        if self._due(recipe.train.evaluate_every_steps):
            self._evaluate()
        stopping = outcome.stop and progress.step < self._last_step
        if stopping or self._due(recipe.checkpoint.every_steps) or self._at_end():
            self._save()
        if stopping:
            raise Stopped(
                f"stopped after step {progress.step}, saved; "
                f"go on with: shoal resume {self.job.run}"
            )

    def _at_end(self) -> bool:
        return self.training.progress.step == self._last_step

    def _log(self, outcome: Outcome, seconds: float) -> None:
        training, progress = self.training, self.training.progress
        traffic = self.group.traffic.take()
        self._report.say(
            "alive", rank=self.group.rank, step=progress.step, waiting=traffic.waiting_seconds
        )
        if not self._first:
            return
        training.log_samples(progress.step - 1, read=outcome.read)
        if progress.step % self.job.recipe.observe.log_every_steps and not self._at_end():
            return
        other = traffic.communication_seconds + traffic.waiting_seconds
        self.sink.row(
            {
                "step": progress.step,
                "loss": outcome.loss,
                "learning_rate": outcome.learning_rate,
                "gradient_norm": outcome.gradient_norm,
                "tokens": progress.tokens,
                "samples": progress.samples,
                "step_seconds": seconds,
                "compute_seconds": seconds - other,
                "communication_seconds": traffic.communication_seconds,
                "waiting_seconds": traffic.waiting_seconds,
                "tokens_per_second": outcome.targets / seconds,
                "sent_bytes": sum(traffic.sent_bytes.values()),
                "peak_memory_bytes": training.peak_memory_bytes,
                "peak_private_bytes": private_bytes() if progress.step % 50 == 1 else None,
                "mfu": self.job.decision.mfu(tokens=outcome.targets, seconds=seconds),
            }
        )

    def _evaluate(self) -> None:
        training, progress = self.training, self.training.progress
        if self._evaluated_at == progress.step:
            return
        self._evaluated_at = progress.step
        began = time.perf_counter()
        with self.trace.span("evaluate", step=progress.step):
            metrics = training.evaluate()
            completions = training.complete() if self._first else []
            self.group.barrier()
        self.group.traffic.take()
        if self._first:
            row = {"step": progress.step, **metrics, "seconds": time.perf_counter() - began}
            self.sink.row({**row, "completions": completions} if completions else row)

    def _save(self) -> None:
        training, progress = self.training, self.training.progress
        if self._saved_at == progress.step:
            return
        began = time.perf_counter()
        recipe = self.job.recipe
        facts = {
            "progress": vars(progress).copy(),
            "recipe": recipe.model_dump(mode="json"),
            "layout": self.job.decision.to_json()["layout"],
            "data": training.stream_state(progress.step),
            "random_states": training.random_states(),
            "model_config": training.config.to_dict(),
            "ties": [list(names) for names in training.anatomy.ties],
            "inputs": self.job.inputs.to_json(),
        }
        facts["fingerprint"] = fingerprint_of(training) if self._first else None
        with self.trace.span("save", step=progress.step):
            where = save(
                training.store,
                training.state,
                group=self.group,
                step=progress.step,
                facts=facts,
                keep=recipe.checkpoint.keep,
            )
        self._saved_at = progress.step
        self.group.traffic.take()
        if self._first:
            seconds = time.perf_counter() - began
            self.sink.event("saved", {"step": progress.step, "seconds": seconds, "at": where.name})

    # --- the end

    def _finish(self) -> None:
        training, job = self.training, self.job
        whole = training.progress.step >= training.steps
        if self._saved_at != training.progress.step:
            self._save()
        if job.recipe.observe.trace:
            found = gather_json(self.group, [self.trace.spans, self.trace.left_out])
            if self._first:
                spans = [span for theirs, _ in found for span in theirs]
                left_out = sum(count for _, count in found)
                write_trace(job.run / "trace.json", spans, left_out=left_out)
        if self._first:
            if whole and job.final_model:
                self._report.say("phase", text=f"writing the model to {job.run / 'model'}")
                write_model(training, out=job.run / "model")
            self.sink.event("finished" if whole else "paused", {"step": training.progress.step})
            self.sink.close()
            self._report.say(
                "done",
                step=training.progress.step,
                steps=training.steps,
                tokens=training.progress.tokens,
                seconds=training.progress.seconds,
                parameters=sum(p.numel() for p in training.model.parameters()),
                peak_memory_bytes=training.peak_memory_bytes,
                unigram_nats=training.evaluation.unigram_nats(),
            )
        self.group.barrier()


def _sinks(job: Job) -> list[Sink]:
    from shoal.observe.boards import TensorBoard, WandB

    sinks: list[Sink] = [RunFiles(job.run)]
    if job.recipe.observe.tensorboard:
        sinks.append(TensorBoard(job.run))
    if job.recipe.observe.wandb:
        sinks.append(WandB(job.run, config=job.recipe.model_dump(mode="json")))
    return sinks


def _facts(job: Job) -> dict[str, Any]:
    return {"decision": job.decision.to_json(), "torch": torch.__version__}


def _check_same_run(saved: dict[str, Any], wanted: dict[str, Any], *, at: Path) -> None:
    for path in changed(saved, wanted):
        raise RunError(
            f"{at}: {path} differs from the run that was saved; a resumed run keeps "
            f"{', '.join(LOCKED)}. Start a new run with --out for other values"
        )
