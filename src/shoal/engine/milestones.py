"""One rank's evaluations and saves: what happens between two steps of the loop, when it is due."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from shoal.comm.group import Group
from shoal.engine.evaluate import complete_prompts, evaluate
from shoal.engine.export import fingerprint_of, saves_read
from shoal.engine.log import RunLog
from shoal.engine.membership.agree import Position
from shoal.engine.saving.parts import random_state
from shoal.engine.saving.saver import Saver
from shoal.engine.training import Training
from shoal.observe.events import Report
from shoal.observe.trace import Trace


class Milestones:
    """Collective over `group`; what is written, the first rank writes."""

    def __init__(
        self,
        training: Training,
        *,
        group: Group,
        files: RunLog,
        saver: Saver,
        report: Report,
        trace: Trace,
        check: Callable[[], None],
        is_first: Callable[[], bool],
    ) -> None:
        """`check`: raises PeersLost where waiting is in vain."""
        self._training, self._group, self._files, self._saver = training, group, files, saver
        self._report, self._trace, self._check, self._is_first = report, trace, check, is_first

    def evaluate(self, position: Position) -> None:
        """Score the validation part. Raises PeersLost."""
        training, progress, group = self._training, self._training.progress, self._group
        group.pulse.mark("evaluate")
        began = time.perf_counter()
        with self._trace.span("evaluate", step=progress.step):
            metrics = evaluate(training, progress=self.evaluating)
            takes_part = self._is_first() or training.replica.is_cut
            self.tell("completing the prompts")
            completions = complete_prompts(training) if takes_part else []
            group.barrier()
        group.traffic.take()
        if progress.step:
            training.watch.evaluated(progress.step, metrics["evaluation_loss"])
            position.facts.update(training.facts())
        if self._is_first():
            row = {"step": progress.step, **metrics, "seconds": time.perf_counter() - began}
            self._files.shown(training.shown)  # first: who hears of the row draws the picture
            self._files.evaluated({**row, "completions": completions} if completions else row)

    def evaluating(self, done: float) -> None:
        """Tell how much of an evaluation is done."""
        self.tell("evaluating", done)

    def tell(self, what: str, done: float | None = None) -> None:
        """Tell a person what goes on."""
        if self._is_first():
            self._report.say("progress", text=what, done=done)

    def save(self, *, last: bool) -> None:
        """Save the step just taken. `last`: it is waited for. Raises PeersLost, RunError."""
        training, progress = self._training, self._training.progress
        self._group.pulse.mark("save")
        equal = training.policy.equal_after(progress.step)
        logits = fingerprint_of(training) if training.replica.is_cut or self._is_first() else []

        def facts() -> dict[str, Any]:
            return {
                **training.facts(),
                "recipe": training.job.recipe.model_dump(mode="json"),
                "layout": training.job.decision.to_json()["layout"],
                "data": training.stream.state(progress.step),
                "model_config": training.replica.settings.config.to_dict(),
                "ties": [list(names) for names in training.anatomy.ties],
                "inputs": training.job.inputs.to_json(),
                "fingerprint": logits if equal else [],
            }

        training.store.best = training.watch.best
        if last:  # which is waited for
            self.tell(f"saving step {progress.step}")
        with self._trace.span("save", step=progress.step):
            self._saver.save(
                training.state,
                group=self._group,
                layout=training.ranks.layout,
                step=progress.step,
                facts=facts,
                own={"random_state": random_state(), "policy": training.policy.facts()},
                equal=equal,
                last=last,
                needed=saves_read(training) if last else (),
                while_waiting=self._still_saving,
            )
        self._group.traffic.take()

    def _still_saving(self) -> None:
        self._check()
        self._group.pulse.mark("save")
