"""What rank 0 writes while a run goes on: rows, events, samples read; whoever is rank 0 now."""

from __future__ import annotations

from collections import deque
from typing import Any

from shoal.comm.group import Traffic
from shoal.data.verify import FILE, sample_header, sample_row
from shoal.engine.job import Job
from shoal.engine.training import Training
from shoal.engine.update import Outcome
from shoal.observe.events import Report, Sink, Tee
from shoal.observe.memory import private_bytes
from shoal.observe.outliers import Outliers
from shoal.observe.record import Record, RunRecord, ToldRecord
from shoal.observe.trackers import TensorBoard, WandB

KEPT_ROWS = 10_000
"""Rows that a rank keeps at most for a writer that does not come to them: a few MiB."""


class RunLog:
    """The files of a run directory, as one rank may write them; only rank 0 opens them.

    Where replicas step by themselves, others may be many steps ahead of the writer when it dies:
    every rank keeps its rows since all have met, and who writes next adds those that are missing.
    """

    def __init__(self, job: Job, *, report: Report, training: Training) -> None:
        self._job, self._report, self._training = job, report, training
        self._trackers: list[Sink] | None = None
        self._record: Record = ToldRecord(report) if job.own_disks else RunRecord(job.run)
        self._outliers = Outliers()
        self._kept: deque[dict[str, Any]] = deque(maxlen=KEPT_ROWS)
        self.sink: Sink = Tee([])

    @property
    def events(self) -> Sink:
        """For events before the files are open for rows."""
        return Tee([self._record, self._report])

    def open(self, *, last: dict[str, Any], step: int | None = None) -> None:
        """Begin to write, as the first rank at `step` (default: that of `last`).

        Rows of later steps, which are about to be done again, go; rows that the rank that should
        have written them did not come to are taken from `last`.
        """
        step = last["progress"]["step"] if step is None else step
        self.close()
        first = self._trackers is None
        self._trackers = _trackers(self._job) if self._trackers is None else self._trackers
        told = self._record.begin(
            step=step,
            anew=step == 0 and not last,  # else the evaluation before the first step stands
            samples=FILE,
            header=sample_header(self._training.stream),
            missing=self._missing(last, step=step),
        )
        others = Tee([*self._trackers, self._report])
        for message in told:
            if message["kind"] == "row":
                others.row(message["row"])
            else:
                others.event(message["name"], message["fields"])
        self.sink = Tee([self._record, *others.sinks])
        for tracker in self._trackers if first else []:
            if isinstance(tracker, WandB) and tracker.address:
                self.sink.event("wandb", {"text": tracker.address})

    def _missing(self, last: dict[str, Any], *, step: int) -> dict[str, Any]:
        """What the rank that should have written it may not have come to."""
        if "rows" not in last:
            return {}
        alone, stream = self._training.policy.alone, self._training.stream
        return {
            "rows": [row for row in last["rows"] if self._logged(row["step"])],
            "sample": None if alone else sample_row(step - 1, stream=stream, read=last["read"]),
            "every": self._job.recipe.observe.log_every_steps,
            "kept": KEPT_ROWS,
        }

    def keep(self, row: dict[str, Any], *, alone: bool) -> list[dict[str, Any]]:
        """Remember the row of a step for whoever writes next; the rows remembered now.

        `alone`: replicas step by themselves, so that all before are remembered too.
        """
        if not alone:
            self._kept.clear()
        if self._logged(row["step"]):
            self._kept.append(row)
        return list(self._kept)

    def take(self, facts: dict[str, Any]) -> None:
        """Remember the rows that the rank remembers whose state all go on from."""
        self._kept.clear()
        self._kept.extend(facts.get("rows", ()))

    def met(self) -> None:
        """Nobody lacks a row: all have met after the writer wrote its own, or go back to a save."""
        self._kept.clear()

    def _logged(self, step: int) -> bool:
        every = self._job.recipe.observe.log_every_steps
        early = self._job.recipe.train.stop_after_steps or self._training.steps
        return step % every == 0 or step == min(early, self._training.steps)

    def samples_read(self, step: int, read: list[int]) -> None:
        """Write the digest of what all ranks have read for `step`, counted from 0."""
        self._record.sample(sample_row(step, stream=self._training.stream, read=read))

    def row(self, outcome: Outcome, *, seconds: float, traffic: Traffic) -> dict[str, Any]:
        """The row of the step just committed; the same numbers on every rank but for its times."""
        training, progress = self._training, self._training.progress
        other = traffic.communication_seconds + traffic.waiting_seconds
        scale = {"loss_scale": training.loss_scale.value} if training.loss_scale else {}
        return scale | {
            "step": progress.step,
            "loss": outcome.step.loss,
            "learning_rate": outcome.learning_rate,
            "gradient_norm": outcome.gradient_norm,
            "tokens": progress.tokens,
            "samples": progress.samples,
            "step_seconds": seconds,
            "compute_seconds": seconds - other,
            "communication_seconds": traffic.communication_seconds,
            "waiting_seconds": traffic.waiting_seconds,
            "tokens_per_second": outcome.step.targets / seconds,
            "sent_bytes": sum(traffic.sent_bytes.values()),
            "sent_bytes_by_link": self._by_link(traffic),
            "peak_memory_bytes": training.peak_memory_bytes,
            "peak_private_bytes": private_bytes() if progress.step % 50 == 1 else None,
            "mfu": self._job.decision.mfu(tokens=outcome.step.targets, seconds=seconds),
            **outcome.step.figures,
            **training.policy.figures(),
            **training.policy.shares.figures(),
        }

    def _by_link(self, traffic: Traffic) -> dict[str, int]:
        """Bytes that went to each other replica or server, and those within this replica."""
        layout, here = self._training.ranks.layout, self._training.ranks.replica
        found: dict[str, int] = {}
        for link, num_bytes in sorted(traffic.sent_to.items(), key=lambda each: str(each[0])):
            other = None if isinstance(link, str) else layout.replica_of(link)
            name = link if isinstance(link, str) else f"replica {other}"
            if other != here:
                found[name] = found.get(name, 0) + num_bytes
        inside = sum(traffic.sent_bytes.values()) - sum(found.values())
        return found | ({"inside": inside} if inside else {})

    def committed(self, row: dict[str, Any], outcome: Outcome) -> None:
        """Write what the step just committed came to, and name what is odd about it."""
        step = row["step"]
        if not self._training.policy.alone:  # else nobody knows yet what the others have read
            self.samples_read(step - 1, outcome.step.counted.read)
        if self._logged(step):
            self.sink.row(row)
        policy = self._training.policy
        for name, fields in (*policy.notes(), *policy.shares.notes()):
            self.sink.event(name, {"step": step, **fields})
        warning = self._training.watch.begins_to_diverge
        if warning is not None:
            self.sink.event("diverging", {"step": step, "text": warning})
        if not outcome.applied and not policy.shares.is_idle:
            why = "no targets" if outcome.step.targets == 0 else "gradients are not finite"
            culprits = self._outliers.not_finite(outcome.step.norms)
            named = f" (those of rank {', '.join(map(str, culprits))})" if culprits else ""
            text = f"step skipped: {why}{named}"
            self.sink.event("skipped", {"step": step, "ranks": culprits, "text": text})
        if not outcome.applied:
            return
        for name, fields in self._outliers.look(loss=outcome.step.loss, norms=outcome.step.norms):
            self.sink.event(name, {"step": step, **fields})

    def evaluated(self, row: dict[str, Any]) -> None:
        """Write an evaluation, unless it was written before the rank that made it died."""
        if not self._record.knows(row):
            self.sink.row(row)

    def shown(self, shown: dict[str, Any] | None) -> None:
        """Write what the task's picture is drawn of, if it has one."""
        if shown is not None:
            self._record.shown(shown)

    def close(self) -> None:
        """Nothing follows, or another rank writes from now on."""
        self._record.close()


def _trackers(job: Job) -> list[Sink]:
    sinks: list[Sink] = []
    config = job.recipe.model_dump(mode="json")
    if job.recipe.observe.tensorboard:
        sinks.append(TensorBoard(job.run, config=config))
    if job.recipe.observe.wandb:
        sinks.append(WandB(job.run, config=config, settings=job.recipe.observe.wandb))
    return sinks


def pace(row: dict[str, Any]) -> dict[str, Any]:
    """What the supervisor needs of a row: whether this rank keeps up."""
    names = ("step", "step_seconds", "compute_seconds", "waiting_seconds")
    return {name: row[name] for name in names}
