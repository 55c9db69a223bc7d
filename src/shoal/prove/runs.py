"""The runs of a proof: one recipe, trained by the real engine in several ways, each recorded."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.config.load import to_yaml
from shoal.config.recipe import Recipe
from shoal.engine.decision import Decision
from shoal.engine.job import Inputs, Instruments, Job
from shoal.errors import WorkerError
from shoal.launch.pool import WorkerPool
from shoal.launch.supervise import run_workers
from shoal.layout import Layout
from shoal.observe.console import Console
from shoal.prove.recording import Recording
from shoal.prove.subject import proof_decision, with_layout

Say = Callable[[str], None]


@dataclass
class Runs:
    """Trains recipes on the same inputs, each below a folder of its own."""

    inputs: Inputs
    out: Path
    pool: WorkerPool
    say: Say

    def train(
        self,
        name: str,
        recipe: Recipe,
        layout: Layout,
        *,
        micro: int = 1,
        double: bool = False,
        mistake: str | None = None,
    ) -> Recording:
        """One run from its start. Raises WorkerError, and the errors of a run that cannot start."""
        self.say(f"{name}: {layout}")
        run = self.out / name
        run.mkdir(parents=True)
        recipe = with_layout(recipe, layout)
        instruments = Instruments(record=True, mistake=mistake)
        decision = proof_decision(recipe, layout, micro=micro)
        self._run(run, recipe, decision, double=double, instruments=instruments)
        return Recording(run)

    def resume(self, recording: Recording, recipe: Recipe, *, at: int) -> list[float]:
        """Losses of one worker that goes on from the checkpoint of step `at`."""
        self.say(f"back: one worker goes on from step {at}")
        run = self.out / "back"
        (run / "checkpoints").mkdir(parents=True)
        saved = f"checkpoints/step-{at:08d}"
        (recording.run / saved).rename(run / saved)
        recipe = with_layout(recipe, Layout())
        self._run(run, recipe, proof_decision(recipe, Layout()), resume=True)
        return Recording(run).losses

    def _run(self, run: Path, recipe: Recipe, decision: Decision, **more: Any) -> None:
        (run / "config.yaml").write_text(to_yaml(recipe), encoding="utf-8")
        job = Job(recipe, run, self.inputs, decision, final_model=False, **more)
        attempt = run_workers(job, pool=self.pool, console=Console(out=io.StringIO()))
        if attempt.done is None:
            raise WorkerError(f"{run.name}: the workers ended without finishing")
