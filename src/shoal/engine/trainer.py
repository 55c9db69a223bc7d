"""The training loop, in plain sight, and what is committed after each step."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shoal.comm.group import Group, ProcessGroup
from shoal.comm.keys import Keys
from shoal.comm.messages import broadcast_json, gather_json
from shoal.config.recipe import Recipe
from shoal.engine.agree import FRESH, Standing, agree, check_same_program, transfer
from shoal.engine.build import Training, build
from shoal.engine.decision import Decision
from shoal.engine.digest import ReplicasDiffer, compare, differing_tensors, digest_of
from shoal.engine.export import fingerprint_of, write_model
from shoal.engine.faults import PlannedFaults
from shoal.engine.log import RunLog
from shoal.engine.members import Members, members_of
from shoal.engine.mistakes import make
from shoal.engine.orders import Orders
from shoal.engine.prepare import Inputs
from shoal.engine.ranks import Ranks, meet, whole
from shoal.engine.recorder import Recorder
from shoal.engine.saver import Saver
from shoal.engine.saving import check_same_run, choose_checkpoint, load, random_state
from shoal.engine.step import Batch, StepResult, Word
from shoal.engine.update import Outcome
from shoal.errors import PeersLost, Stopped, WorkerError
from shoal.layout import Share
from shoal.observe.events import Report
from shoal.observe.memory import LiveStorage
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
    joining: bool = False
    """Takes the place of a lost worker: the state comes from a living one, and is not drawn."""
    final_model: bool = True
    fault: str | None = None
    """A planned mistake (engine/mistakes.py), for showing that checks see it."""
    faults: tuple[dict[str, Any], ...] = ()
    """Faults to commit at a rank, step and phase (engine/faults.py), for rehearsals."""
    score: str | None = None
    """Only evaluate, and write the scores to this file."""
    record: bool = False
    """Keep parameters and gradients of every step (engine/recorder.py), for proofs."""
    double: bool = False
    """Compute in float64, for proofs."""


def train(
    job: Job,
    *,
    group: Group,
    place: Place,
    report: Report,
    orders: Orders,
    supervised: bool = False,
    keys: Keys | None = None,
) -> None:
    """Train to the end of the recipe, or until asked to stop. Raises Stopped after saving."""
    members = members_of(
        group, orders=orders, place=place, report=report, supervised=supervised, keys=keys
    )
    Trainer(job, group=group, members=members, place=place, report=report, orders=orders).run()


class Trainer:
    """One rank's loop."""

    def __init__(
        self,
        job: Job,
        *,
        group: Group,
        members: Members,
        place: Place,
        report: Report,
        orders: Orders,
    ) -> None:
        self.job, self.group, self.members, self.place = job, group, members, place
        self._report, self._orders = report, orders
        self.pulse = group.pulse
        self.pulse.mark("building the model")
        if place.rank == 0:
            report.say("phase", text="building the model")
        self.trace = Trace(on=job.recipe.observe.trace, rank=place.rank)
        self._step_began = time.perf_counter()
        self._standing = Standing()
        self._broken: PeersLost | ReplicasDiffer | None = None
        self._finished = False
        self.training: Training
        self._built = False
        if job.decision.layout.replica_workers == 1 or place.size == 1:
            self._build(whole(group, device=place.device))

    def _build(self, ranks: Ranks) -> None:
        """Build the model and all around it. A replica of several workers must have met before."""
        job, place, report = self.job, self.place, self._report
        self.training = build(job, ranks=ranks, place=place, report=report)
        if job.faults:
            self.pulse.on_mark = PlannedFaults(job.faults, place.rank, self.training, report).mark
        if job.record:
            self.training.update.on_reduced = Recorder(job.run, self.training).note
        if job.fault is not None:
            make(job.fault, self.training)
        self.files = RunLog(job, report=report, training=self.training)
        settings = job.recipe.checkpoint
        self._saver = Saver(self.training.store, keep=settings.keep, background=settings.background)
        self._built = True

    @property
    def _first(self) -> bool:
        return self.group.rank == 0

    # --- the loop

    def run(self) -> None:
        """Restore or start, then step until done."""
        if self.job.score is not None and self._built:
            Path(self.job.score).write_text(json.dumps(self.training.evaluate()), encoding="utf-8")
            return
        self._enter()
        while not self._finished:
            try:
                if self._broken is not None:
                    self._mend(self._broken)
                self._settle()
                if self.training.progress.step < self._last_step:
                    self._step()
                else:
                    self._finish()
            except (PeersLost, ReplicasDiffer) as problem:  # nothing of the step was applied here
                self._broken = problem

    def _step(self) -> None:
        """One step: nothing of it is applied unless all of it is."""
        training, sync, step = self.training, self.training.sync, self.training.progress.step
        self._step_began = time.perf_counter()
        self.pulse.mark("batches", step=step + 1)
        sync.before_step(step)
        share = sync.share()
        with self.trace.span("batches", step=step):
            batch = training.batches(step, share)
        with self.trace.span("forward_backward", step=step):
            result = self._measured(batch, share=share, step=step)
        with self.trace.span("update", step=step):
            outcome = training.update.apply(result)
            sync.after_step(step)
        self._commit(outcome)

    def _measured(self, batch: Batch, *, share: Share, step: int) -> StepResult:
        """Run the step; the first one of a run is counted storage by storage (DESIGN 5.9)."""
        training = self.training
        run, orders = training.forward_backward.run, self._orders
        word = Word(orders.stop.is_set(), orders.save.is_set(), self.members.pending)
        digest = self._digest(step)
        if training.peak_memory_bytes is not None or self.place.device.type != "cpu":
            return run(batch, share=share, step=step, word=word, digest=digest)
        resident = training.resident()
        with LiveStorage(base_bytes=sum(tensor.nbytes for tensor in resident)) as live:
            live.ignore(resident)  # their views and updates in place are no new storage
            result = run(batch, share=share, step=step, word=word, digest=digest)
        training.peak_memory_bytes = live.peak_bytes
        return result

    def _digest(self, step: int) -> int | None:
        every = self.job.recipe.sync.verify_every_steps
        if every == "auto":
            every = 1 if self.place.device.type == "cpu" else 100
        alone = self.training.ranks.num_replicas == 1
        if not every or step % every or alone or self.group.shares_memory:
            return None
        self.pulse.mark("verify")
        with self.trace.span("verify", step=step):
            return digest_of(self.training.state)

    # --- membership and repair

    def _enter(self, lost: PeersLost | None = None) -> None:
        """Join the newest epoch and agree on one state with its members."""
        job = self.job
        if self._built:
            self._saver.leave()
        while True:
            try:
                self.members.join(lost)
                self._take_place()
                training = self.training
                recipe = job.recipe.model_dump(mode="json")
                parameters = training.replica.num_parameters
                check_same_program(self.group, recipe=recipe, parameters=parameters)
                self._standing = agree(
                    self.group,
                    self._standing,
                    state=training.state,
                    keys=self.members.keys,
                    epoch=self.pulse.epoch,
                )
                if self._standing.step == FRESH:
                    self._begin()
                else:
                    training.update_progress(self._standing.facts)
                    if self._first:
                        self.files.open(last=self._standing.facts)
                self._broken = None
                return
            except PeersLost as again:
                lost = again

    def _take_place(self) -> None:
        """Stand among the ranks of the epoch; only then is a model cut, for it needs the others."""
        if self.job.decision.layout.replica_workers == 1:
            return
        assert isinstance(self.group, ProcessGroup), "threads are whole replicas"
        self.pulse.mark("building the model")
        layout, device = self.job.decision.layout, self.place.device
        ranks = meet(self.group, layout=layout, device=device)
        if self._built:
            self.training.enter(ranks)
        else:
            self._build(ranks)

    def _begin(self) -> None:
        """The state of a run that begins or is resumed; nobody has one yet."""
        training, job = self.training, self.job
        if job.joining:
            raise WorkerError("joined a run whose state nobody holds any more")
        if job.resume:
            step = self._restore()
        else:
            step = 0
            self._standing = Standing(0, saved_at=0, facts=training.facts())
        if self._first:
            self.files.open(last={}, step=step)
            kind = "resumed" if job.resume else "started"
            fields = {"decision": job.decision.to_json(), "torch": torch.__version__}
            self.files.sink.event(kind, {"step": training.progress.step, **fields})
            self._report.say("phase", text="the first step")

    def _restore(self) -> int:
        """Load the newest checkpoint that can be trusted; returns its step."""
        training = self.training
        self.pulse.mark("restore")
        step = choose_checkpoint(training.store, group=self.group, sink=self.files.events)
        reader = training.store.open(step)
        check_same_run(reader.state["recipe"], self.job.recipe, at=self.job.run)
        load(reader, training.state, group=self.group)
        training.update_progress(reader.state)
        states = reader.state["random_states"]
        if self.group.rank < len(states) and not self.group.shares_memory:
            raw = bytearray(bytes.fromhex(states[self.group.rank]))
            torch.set_rng_state(torch.frombuffer(raw, dtype=torch.uint8))
        self._standing = Standing(step, evaluated_at=step, saved_at=step)
        self._standing.facts = training.facts()
        self.group.barrier()
        return step

    def _mend(self, problem: PeersLost | ReplicasDiffer) -> None:
        """Go on after a loss in the next epoch; make replicas equal that are not."""
        if isinstance(problem, PeersLost):
            self._enter(problem)
            return
        self.pulse.mark("repair")
        training, moves = self.training, problem.repairs()
        wrong = differing_tensors(self.group, training.state)
        named = ", ".join(f"{name} (rank {', '.join(map(str, r))})" for name, r in wrong.items())
        if moves is not None:
            transfer(
                self.group,
                training.state,
                moves=moves,
                keys=self.members.keys,
                epoch=self.pulse.epoch,
            )
            good = ", ".join(str(source) for source, _ in moves)
            text = f"replicas differ in {named}; repaired from rank {good}"
        elif self._anything_saved():
            step = self._restore()
            if self._first:
                self.files.open(last={}, step=step)
            text = f"replicas differ in {named}; no majority, so back to the save of step {step}"
        else:
            raise WorkerError(f"replicas differ in {named}; no majority, and nothing saved yet")
        if self._first:
            self.files.sink.event("repaired", {"step": training.progress.step, "text": text})
        self._broken = None

    def _anything_saved(self) -> bool:
        """Whether there is a checkpoint, the one being written counted; the same on every rank."""
        self._saver.wait(timeout_seconds=60.0)
        self.group.barrier()
        self._saver.leave()
        return bool(broadcast_json(self.group, bool(self.training.store.steps())))

    # --- after a step

    @property
    def _last_step(self) -> int:
        early = self.job.recipe.train.stop_after_steps
        return min(self.training.steps, early) if early else self.training.steps

    def _due(self, every: int) -> bool:
        step = self.training.progress.step
        return every > 0 and (step % every == 0 or step == self._last_step)

    def _commit(self, outcome: Outcome) -> None:
        """The step counts from here on: rows, evaluation, checkpoint, in this order."""
        training, standing = self.training, self._standing
        progress = training.progress
        progress.step += 1
        progress.applied_steps += outcome.applied
        progress.tokens += outcome.targets
        progress.samples += self.job.recipe.train.global_batch_samples
        seconds = time.perf_counter() - self._step_began
        progress.seconds += seconds
        standing.step = progress.step
        self.pulse.mark("commit", step=progress.step)
        traffic = self.group.traffic.take()
        row = self.files.row(outcome, seconds=seconds, traffic=traffic)
        standing.facts = {**training.facts(), "row": row, "read": outcome.read}
        self._report.say("step", rank=self.group.rank, epoch=self.pulse.epoch, **_pace(row))
        if self._first:
            self.files.committed(row, outcome)
        stopping = outcome.word.stop and progress.step < self._last_step
        self._settle(save=stopping or outcome.word.save, last=stopping)
        if outcome.word.save:
            self._orders.save.clear()
        if stopping:
            raise Stopped(
                f"stopped after step {progress.step}, saved; "
                f"go on with: shoal resume {self.job.run}"
            )
        if outcome.word.leave:
            self._enter()

    def _settle(self, *, save: bool = False, last: bool = False) -> None:
        """What is due at this step and not yet done: evaluation, checkpoint."""
        recipe, step = self.job.recipe, self.training.progress.step
        standing = self._standing
        if self._due(recipe.train.evaluate_every_steps) and standing.evaluated_at != step:
            self._evaluate()
            standing.evaluated_at = step
        last = last or step == self._last_step
        due = save or last or self._due(recipe.checkpoint.every_steps)
        if due and step and standing.saved_at != step:
            self._save(last=last)
            standing.saved_at = step
        notes = self._saver.notes()
        for name, fields in notes if self._first else []:
            self.files.sink.event(name, fields)

    def _evaluate(self) -> None:
        training, progress = self.training, self.training.progress
        self.pulse.mark("evaluate")
        began = time.perf_counter()
        with self.trace.span("evaluate", step=progress.step):
            metrics = training.evaluate()
            speaks = self._first or training.replica.is_cut
            completions = training.complete() if speaks else []
            self.group.barrier()
        self.group.traffic.take()
        if self._first:
            row = {"step": progress.step, **metrics, "seconds": time.perf_counter() - began}
            self.files.evaluated({**row, "completions": completions} if completions else row)

    def _save(self, *, last: bool) -> None:
        training, progress = self.training, self.training.progress
        self.pulse.mark("save")
        digest = self._digest(0)
        if digest is not None:  # what is saved must be what all replicas hold
            digests = [int(text, 16) for text in gather_json(self.group, f"{digest:x}")]
            compare(digests, places=training.ranks.cut.workers)
        recipe = self.job.recipe
        logits = fingerprint_of(training) if training.replica.is_cut or self._first else []

        def facts() -> dict[str, Any]:
            return {
                **training.facts(),
                "recipe": recipe.model_dump(mode="json"),
                "layout": self.job.decision.to_json()["layout"],
                "data": training.stream_state(progress.step),
                "model_config": training.config.to_dict(),
                "ties": [list(names) for names in training.anatomy.ties],
                "inputs": self.job.inputs.to_json(),
                "fingerprint": logits,
            }

        with self.trace.span("save", step=progress.step):
            self._saver.save(
                training.state,
                group=self.group,
                step=progress.step,
                facts=facts,
                random_state=random_state(),
                last=last,
                while_waiting=lambda: self.pulse.mark("save"),
            )
        self.group.traffic.take()

    # --- the end

    def _finish(self) -> None:
        training, job = self.training, self.job
        whole = training.progress.step >= training.steps
        self.pulse.mark("finish")
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
            self.files.sink.event(
                "finished" if whole else "paused", {"step": training.progress.step}
            )
            self.files.close()
            self._report.say("phase", text="scoring the baseline")
            self._report.say(
                "done",
                step=training.progress.step,
                steps=training.steps,
                tokens=training.progress.tokens,
                seconds=training.progress.seconds,
                parameters=training.replica.num_parameters,
                peak_memory_bytes=training.peak_memory_bytes,
                task=training.task.kind,
                baseline=training.task.baseline(training.evaluation),
            )
        self._finished = True
        if self.group.shares_memory:
            self.group.barrier()  # no thread leaves while another still reads


def _pace(row: dict[str, Any]) -> dict[str, Any]:
    """What the supervisor needs of a row: whether this rank keeps up."""
    names = ("step", "step_seconds", "compute_seconds", "waiting_seconds")
    return {name: row[name] for name in names}
