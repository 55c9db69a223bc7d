"""The training loop, in plain sight, and what is committed after each step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from shoal.comm.group import Group, ProcessGroup
from shoal.comm.messages import broadcast_json, gather_json
from shoal.config.sync import is_same
from shoal.engine.evaluate import evaluate
from shoal.engine.finish import finish
from shoal.engine.job import Job
from shoal.engine.log import RunLog, pace
from shoal.engine.membership.agree import FRESH, Position, agree, check_same_program, transfer
from shoal.engine.membership.digest import ReplicasDiffer, compare, differing_tensors, digest_of
from shoal.engine.membership.members import Members
from shoal.engine.membership.orders import Orders
from shoal.engine.milestones import Milestones
from shoal.engine.passes import Batch
from shoal.engine.saving.parts import (
    check_progress,
    check_same_run,
    choose_checkpoint,
    load,
)
from shoal.engine.saving.saver import KEPT, Saver
from shoal.engine.step import StepResult, Votes
from shoal.engine.training import Training
from shoal.engine.unshared import Unshared, votes_of_all
from shoal.engine.update import Outcome
from shoal.errors import PeersLost, Stopped, WorkerError
from shoal.layout import Share
from shoal.observe.events import Report
from shoal.observe.memory import LiveStorage
from shoal.observe.trace import Trace, trace_path, write_trace
from shoal.parallel.ranks import Ranks, meet, whole
from shoal.runtime import WorkerInfo
from shoal.sync.kinds import KINDS


class Trainer:
    """One rank's loop.

    A model that is whole is built before the ranks meet, for that takes long; one that is cut needs
    the others, and is built once the first generation is entered.
    """

    def __init__(
        self,
        job: Job,
        *,
        group: Group,
        members: Members,
        build: Callable[..., Training],
        worker: WorkerInfo,
        report: Report,
        orders: Orders,
    ) -> None:
        self.job, self.group, self.members, self.worker = job, group, members, worker
        self._report, self._orders, self._make = report, orders, build
        self.pulse = group.pulse
        self.pulse.mark("building the model")
        if worker.rank == 0:
            report.say("phase", text="building the model")
        self.trace = Trace(on=job.recipe.observe.trace, rank=worker.rank)
        self._step_began = time.perf_counter()
        self._position = Position()
        self._unshared = Unshared()
        self._broken: PeersLost | ReplicasDiffer | None = None
        self._finished = False
        self.training: Training
        self._built = False
        if job.decision.layout.replica_workers == 1 or worker.size == 1:
            self._build(whole(group, device=worker.device))

    def _build(self, ranks: Ranks) -> None:
        """Build the model and all around it. A replica of several workers must have met before."""
        job, report = self.job, self._report
        self.training = self._make(ranks=ranks)
        self.training.attach(self.trace, check=self.members.check)
        self.files = RunLog(job, report=report, training=self.training)
        settings = job.recipe.checkpoint
        self._saver = Saver(self.training.store, keep=settings.keep, background=settings.background)
        self._milestones = Milestones(
            self.training,
            group=self.group,
            files=self.files,
            saver=self._saver,
            report=report,
            trace=self.trace,
            check=self.members.check,
            is_first=lambda: self._first,
        )
        self.training.play.tell = self._milestones.tell
        self.training.store.tell = self._fetching
        self._built = True

    @property
    def _first(self) -> bool:
        """Whether this rank writes for the run."""
        return self.group.rank == 0 and self._speaks

    @property
    def _speaks(self) -> bool:
        """Whether this rank's group speaks for the run: where replicas stand apart, one does."""
        is_first = self.job.decision.layout.replica_of(self.worker.rank) == 0
        return is_first or not KINDS[self.job.recipe.sync.kind].apart

    # --- the loop

    def run(self) -> None:
        """Restore or start, then step until done."""
        if self.job.score is not None and self._built:
            scores = evaluate(self.training, progress=self._milestones.evaluating)
            Path(self.job.score).write_text(json.dumps(scores), encoding="utf-8")
            return
        self._join_generation()
        while not self._finished:
            try:
                if self._broken is not None:
                    self._repair(self._broken)
                self.training.policy.before_step(self.training.progress.step)
                self._evaluate_and_save_when_due()
                if self.training.progress.step < self._last_step:
                    self._step()
                else:
                    self._finish()
            except (PeersLost, ReplicasDiffer) as problem:  # nothing of the step was applied here
                if isinstance(problem, PeersLost) and self.members.is_fixed:
                    raise
                self._broken = problem

    def _step(self) -> None:
        """One step: nothing of it is applied unless all of it is."""
        training, policy, step = self.training, self.training.policy, self.training.progress.step
        self._step_began = time.perf_counter()
        self.group.traffic.forget_seconds()  # of votes and hashes since the last step
        self.pulse.mark("batches", step=step + 1)
        share = training.share(step)
        with self.trace.span("batches", step=step):
            batch = training.batches(step, share)
        digest = self._digest(step) if not policy.alone else None
        with self.trace.span("forward_backward", step=step):
            result = self._computed(batch, share=share, step=step, digest=digest)
        with self.trace.span("update", step=step):
            outcome = training.update.apply(result)
            self._advance(outcome)
            policy.account(step, result.counted.read)
            try:
                policy.after_step(step, targets=result.targets)
            finally:  # a lost peer prevents what follows, not the step
                row = self._note_row(outcome)
        self._commit(outcome, row)

    def _computed(self, batch: Batch, *, share: Share, step: int, digest: int | None) -> StepResult:
        """Count, vote, and pass; the first step of a run is counted storage by storage on a CPU."""
        training, orders = self.training, self._orders
        votes = Votes(orders.stop.is_set(), orders.save.is_set(), self.members.pending)
        live = None
        counts = self.worker.device.type == "cpu" and not self.job.recipe.parallel.compile
        if training.peak_memory_bytes is None and counts:  # under it torch would never compile
            live = LiveStorage.above(training.state.resident())
        with live or nullcontext():
            counted = training.step.count(batch, votes=votes, step=step, digest=digest)
            result = training.step.train(batch, share=share, counted=counted, step=step)
        if live is not None:
            training.peak_memory_bytes = live.peak_bytes
        elif self.worker.device.type == "cuda":
            training.peak_memory_bytes = torch.cuda.max_memory_allocated(self.worker.device)
        return result

    def _digest(self, step: int) -> int | None:
        """This rank's hash, when one is due after `step` steps and replicas must be equal then."""
        if not self.training.is_hash_due(step):
            return None
        self.pulse.mark("verify")
        with self.trace.span("verify", step=step):
            steady = not self.training.policy.equal_after(step)
            return digest_of(self.training.state, steady=steady)

    def _compare_replicas(self, step: int) -> None:
        """What all replicas hold must be the same bits. Raises ReplicasDiffer."""
        digest = self._digest(step)
        if digest is not None:
            digests = [int(text, 16) for text in gather_json(self.group, f"{digest:x}")]
            compare(digests, layout=self.training.ranks.layout)

    # --- membership and repair

    def _join_generation(self, lost: PeersLost | None = None) -> None:
        """Join the newest generation and agree on one state with its members."""
        if self._built:
            self._saver.leave()
        while True:
            try:
                self.members.join(lost)
                self._enter_ranks()
                self._saver.generation = self.members.registered
                self._saver.divide(self.members.disk)
                recipe = self.job.recipe.model_dump(mode="json")
                training, count = self.training, self.training.replica.num_parameters
                check_same_program(self.group, recipe=recipe, parameters=count)
                self._position.note(training.policy)
                self._position = agree(
                    self.group,
                    self._position,
                    state=training.state,
                    layout=training.ranks.layout,
                    keys=self.members.keys,
                    address=self.members.address,
                    generation=self.pulse.generation,
                )
                if self._position.step == FRESH:
                    self._start_or_resume()
                else:
                    training.restore(self._position.facts)
                    self.files.take(self._position.facts)
                    if self._first:
                        self.files.open(last=self._position.facts)
                self._broken = None
                return
            except PeersLost as again:
                if self.members.is_fixed:
                    raise
                lost = again

    def _enter_ranks(self) -> None:
        """Stand among the ranks of the generation; only then is a model cut."""
        layout, device = self.job.decision.layout, self.worker.device
        if layout.replica_workers == 1:
            ranks = whole(self.group, device=device)
        else:
            assert isinstance(self.group, ProcessGroup), "threads are whole replicas"
            self.pulse.mark("building the model")
            ranks = meet(self.group, layout=layout, device=device)
        if self._built:
            self.training.enter(ranks)
        else:
            self._build(ranks)

    def _start_or_resume(self) -> None:
        """The state of a run that begins or is resumed; nobody has one yet."""
        training, job = self.training, self.job
        if job.joining and not training.policy.apart:
            raise WorkerError("joined a run whose state nobody holds any more")
        if job.resume and not job.joining:
            step = self._restore()
        else:
            step = 0
            self._position = Position(0, saved_at=0, facts=training.facts())
        if training.policy.apart:
            step = self._arrive(step)
        if self._first:
            self.files.open(last={}, step=step)
        if self._first and not job.joining:
            kind = "resumed" if job.resume else "started"
            fields = {"decision": job.decision.to_json(), "torch": torch.__version__}
            self.files.sink.event(kind, {"step": training.progress.step, **fields})
            self._report.say("phase", text="the first step")

    def _arrive(self, step: int) -> int:
        """Join replicas that meet at servers, which know the state and where this replica stands.

        Returns the step to go on with.
        """
        there = self.training.arrive(step)
        if there != step:
            self._position = Position(there, facts=self.training.facts())
        return there

    def _restore(self) -> int:
        """Load the newest checkpoint that can be trusted; returns its step."""
        training, job = self.training, self.job
        self.pulse.mark("restore")
        step = choose_checkpoint(training.store, group=self.group, sink=self.files.events)
        reader = training.store.open(step)
        self.pulse.mark("restore")
        check_same_run(reader.state["recipe"], job.recipe, at=job.run)
        check_progress(reader, steps=training.steps, batch=training.stream.global_batch_samples)
        shapes, layout = training.replica.shapes, training.ranks.layout
        into, same = training.state, is_same(reader.state["recipe"]["sync"], job.recipe.sync)
        load(reader, into, shapes=shapes, group=self.group, layout=layout, same_policy=same)
        training.resume(reader.state, same_policy=same)
        self.files.met()
        states = reader.state["random_states"]
        if self.group.rank < len(states) and not self.group.shares_memory:
            raw = bytearray(bytes.fromhex(states[self.group.rank]))
            torch.set_rng_state(torch.frombuffer(raw, dtype=torch.uint8))
        self._position = Position(step, evaluated_at=step, saved_at=step)
        self._position.facts = training.facts()
        self.group.barrier()
        return step

    def _fetching(self, share: float) -> None:
        """A save comes from a store of objects, which takes as long as it takes."""
        self.pulse.mark("fetching a save")
        self._milestones.tell("fetching a save", share)

    def _repair(self, problem: PeersLost | ReplicasDiffer) -> None:
        """Go on after a loss in the next generation; make replicas equal that are not."""
        if isinstance(problem, PeersLost):
            self._join_generation(problem)
            return
        self.pulse.mark("repair")
        training, moves = self.training, problem.repairs()
        layout = training.ranks.layout
        steady = not training.policy.equal_after(training.progress.step)
        wrong = differing_tensors(self.group, training.state, layout=layout, steady=steady)
        named = ", ".join(f"{name} (rank {', '.join(map(str, r))})" for name, r in wrong.items())
        if moves is not None:
            transfer(
                self.group,
                training.state,
                layout=layout,
                moves=moves,
                keys=self.members.keys,
                address=self.members.address,
                generation=self.pulse.generation,
            )
            good = ", ".join(str(source) for source, _ in moves)
            text = f"replicas differ in {named}; repaired from rank {good}"
        elif self.members.disk is None and self._anything_saved():
            step = self._restore()
            if self._first:
                self.files.open(last={}, step=step)
            text = f"replicas differ in {named}; no majority, so back to the save of step {step}"
        else:
            raise WorkerError(f"replicas differ in {named}; no majority, and no save at hand")
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
        if self.training.watch.ending is not None and self._speaks:
            return self.training.progress.step
        early = [self.training.steps, self.job.recipe.train.stop_after_steps]
        if not self._speaks:  # who speaks ends by saving, however far it is
            early.append(self.training.policy.ends_at)
        return min(step for step in early if step is not None)

    def _due(self, every: int) -> bool:
        step = self.training.progress.step
        return every > 0 and (step % every == 0 or step == self._last_step)

    def _advance(self, outcome: Outcome) -> None:
        """The step is applied here: whoever joins from now on gets what follows it."""
        training, position = self.training, self._position
        progress = training.progress
        progress.step += 1
        progress.applied_steps += outcome.applied
        progress.tokens += outcome.step.targets
        progress.samples += self.job.recipe.train.global_batch_samples
        position.step = progress.step
        if outcome.step.targets:
            training.watch.stepped(progress.step, outcome.step.loss, applied=outcome.applied)

    def _note_row(self, outcome: Outcome) -> dict[str, Any]:
        """The row of the step, kept for who has to write it if this rank does not come to it."""
        training = self.training
        if training.policy.alone and not training.policy.apart:
            self._unshared.note(training.progress.step - 1, outcome.step.counted.read)
        seconds = time.perf_counter() - self._step_began
        training.progress.seconds += seconds
        row = self.files.row(outcome, seconds=seconds, traffic=self.group.traffic.take())
        rows = self.files.keep(row, alone=training.policy.alone and not training.policy.apart)
        read = outcome.step.counted.read
        self._position.facts = {**training.facts(), "rows": rows, "read": read}
        return row

    def _commit(self, outcome: Outcome, row: dict[str, Any]) -> None:
        """The step counts from here on: rows, evaluation, checkpoint, in this order."""
        progress = self.training.progress
        self.pulse.mark("commit")
        generation = self.pulse.generation
        apart = self.training.policy.apart
        rank = self.worker.rank if apart else self.group.rank
        self._report.say("step", rank=rank, generation=generation, **pace(row))
        if self._first:
            self.files.committed(row, outcome)
        votes = self._votes_of_all(outcome.votes)
        stopping = self._stops(votes) and progress.step < self._last_step
        self._evaluate_and_save_when_due(save=stopping or votes.save, last=stopping)
        if votes.save:
            self._orders.save.clear()
        if stopping:
            raise Stopped(
                f"stopped after step {progress.step}, saved; "
                f"go on with: shoal resume {self.job.run}"
            )
        if votes.leave:
            self._join_generation()

    def _votes_of_all(self, votes: Votes) -> Votes:
        """What anybody in the world wants. Replicas that step alone ask when they have met."""
        training, step = self.training, self.training.progress.step
        if not training.policy.alone or training.policy.apart:
            return votes
        if not training.policy.meets_after(step):
            return Votes()
        self._compare_replicas(step)
        self._unshared.share(training.ranks, write=self.files.samples_read)
        found = votes_of_all(votes, training=training, group=self.group)
        self.files.met()
        return found

    def _stops(self, votes: Votes) -> bool:
        """Whether this step ends the run, resumable; replicas that stand apart agree on one."""
        policy = self.training.policy
        if votes.stop:
            policy.ask_to_stop()
        at = policy.ends_at
        reached = at is not None and self.training.progress.step >= at
        return self._speaks and reached if policy.apart else votes.stop

    def _evaluate_and_save_when_due(self, *, save: bool = False, last: bool = False) -> None:
        """What is due at this step and not yet done: evaluation, checkpoint."""
        if not self._speaks:
            return
        recipe, step, position = self.job.recipe, self.training.progress.step, self._position
        last = last or step == self._last_step
        evaluates = self._due(recipe.train.evaluate_every_steps) and position.evaluated_at != step
        saves = save or last or self._due(recipe.checkpoint.every_steps)
        if evaluates or (saves and position.saved_at != step):
            policy, ends = self.training.policy, last and step >= self.training.steps
            with policy.gathered(last=last):
                for number, read in policy.accounted(last=ends):
                    self.files.samples_read(number, read)
                self._evaluate_and_save(save=save, last=last)
        for name, fields in self._saver.notes():
            if name == KEPT:
                self._report.say(KEPT, **fields)
            elif self._first:
                self.files.sink.event(name, fields)
            elif self.members.disk is not None:  # nobody else knows of this one
                self.files.events.event(name, fields)

    def _evaluate_and_save(self, *, save: bool, last: bool) -> None:
        position, watch, recipe = self._position, self.training.watch, self.job.recipe
        step = self.training.progress.step
        if watch.ending is not None and not watch.ending.is_success:
            return
        if self._due(recipe.train.evaluate_every_steps) and position.evaluated_at != step:
            self._milestones.evaluate(position)
            position.evaluated_at = step
        last = last or step == self._last_step
        due = save or last or self._due(recipe.checkpoint.every_steps) or watch.best == step
        if due and step and position.saved_at != step:
            self._settle()
            self._milestones.save(last=last)
            position.saved_at = step

    def _settle(self) -> None:
        """Before a save: what is saved must be what all replicas hold."""
        policy = self.training.policy
        if policy.alone and not policy.apart:
            self._unshared.share(self.training.ranks, write=self.files.samples_read)
        elif not policy.alone:
            self._compare_replicas(0)

    # --- the end

    def _finish(self) -> None:
        self.pulse.mark("finish")
        if self._speaks:
            self.training.policy.ask_to_stop()  # it may end early, for what it has reached
        self.training.policy.finish()
        if self.job.recipe.observe.trace:
            found = gather_json(self.group, [self.trace.spans, self.trace.left_out])
            if self.group.rank == 0:
                part = None if self._speaks else self.worker.rank
                write_trace(trace_path(self.job.run, part=part), found)
        if self._first:
            finish(self.training, files=self.files, report=self._report)
        self._finished = True
        if self.group.shares_memory:
            self.group.barrier()  # no thread leaves while another still reads
