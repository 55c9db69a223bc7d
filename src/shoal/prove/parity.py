"""`shoal parity`: train the user's model, made small, on one worker and in a layout, and compare.

Runs of the real engine from one seed and the same samples: one worker; one worker that adds other
micro batches; one worker in float64; the layout; and one worker that goes on from the layout's
checkpoint. The second and third say how far apart right runs can be.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from shoal.config.anchor import anchored
from shoal.config.load import load_recipe, to_yaml
from shoal.config.recipe import ConfiguredModel, Recipe
from shoal.engine.decision import Decision
from shoal.engine.instruments.mistakes import MISTAKES
from shoal.engine.job import Inputs, Instruments, Job
from shoal.errors import ConfigError, Problem, WorkerError, nearest
from shoal.launch.pool import WorkerPool, pool_or_own
from shoal.launch.prepare import prepare_inputs
from shoal.launch.supervise import run_workers
from shoal.layout import Layout
from shoal.observe.console import Console
from shoal.prove.certificate import Certificate, Failure, judge, tolerance_from
from shoal.prove.diagnose import cause_of
from shoal.prove.recording import Recording, figures_of, relative
from shoal.prove.subject import proof_decision, proof_layout, proof_recipe, with_layout

Say = Callable[[str], None]


def prove(
    recipe: str | Path,
    overrides: Iterable[str] = (),
    *,
    out: Path,
    steps: int = 4,
    whole: bool = False,
    mistake: str | None = None,
    pool: WorkerPool | None = None,
    say: Say = lambda text: None,
) -> Certificate:
    """Prove that the layout of `recipe` with `overrides` equals one worker; runs go below `out`.

    `whole`: the model as it is, not made small. `mistake`: plant one in the layout's run
    (engine/instruments/mistakes.py). Raises UserError for a layout that cannot run, WorkerError for
    one that fails.
    """
    began = time.monotonic()
    if mistake is not None and mistake not in MISTAKES:
        hint = nearest(mistake, MISTAKES)
        raise ConfigError([Problem("--plant", f"unknown mistake {mistake!r}", hint)])
    given = anchored(load_recipe(str(recipe), list(overrides)))
    layout = proof_layout(given)
    inputs = prepare_inputs(given, say=say)
    small = proof_recipe(
        given,
        inputs=inputs,
        layout=layout,
        steps=steps,
        whole=whole,
        num_devices=torch.cuda.device_count(),
    )
    if isinstance(small.model, ConfiguredModel):
        inputs = replace(inputs, model_directory=None)
    with pool_or_own(pool) as workers:
        runs = _Runs(small, inputs, out=out, pool=workers, say=say)
        certificate = _prove(runs, layout=layout, steps=steps, mistake=mistake)
    certificate.seconds = time.monotonic() - began
    certificate.versions = {name: version(name) for name in ("shoal", "torch", "transformers")}
    (out / "certificate.json").write_text(json.dumps(certificate.to_json(), indent=1))
    (out / "certificate.txt").write_text(f"{certificate}\n")
    return certificate


def _prove(runs: _Runs, *, layout: Layout, steps: int, mistake: str | None) -> Certificate:
    one = runs.train("one", Layout())
    samples = runs.recipe.train.global_batch_samples
    reordered = runs.train("reordered", Layout(), micro=2 if samples % 2 == 0 else samples)
    float32 = runs.recipe.precision.compute == "float32"
    double = runs.train("double", Layout(), double=True) if float32 else None
    cut = runs.train("layout", layout, mistake=mistake)
    tolerance = tolerance_from(
        figures_of(reordered, one),
        figures_of(double, one) if double is not None else None,
        promise=float32,
    )
    figures = figures_of(cut, one)
    failures, largest = judge(figures, tolerance)
    certificate = Certificate(
        layout=str(layout),
        model=_described(runs.recipe),
        steps=steps,
        compute=runs.recipe.precision.compute,
        tolerance=tolerance,
        largest=largest,
        failures=failures,
    )
    if failures:
        certificate.cause = cause_of(cut, one, figures, tolerance, layout=layout)
    elif steps > 1:
        back = runs.resume(cut, at=max(1, steps // 2))
        wanted = one.losses[-len(back) :]
        apart = max(relative(a, b) for a, b in zip(back, wanted, strict=True))
        certificate.largest["round trip"] = (apart, "one worker goes on from its checkpoint")
        if not apart <= tolerance.loss:
            failures.append(Failure("round trip", "loss", None, apart, tolerance.loss))
            certificate.cause = "the checkpoint does not hold what the layout had"
    certificate.proven = not failures
    return certificate


def _described(recipe: Recipe) -> str:
    model = recipe.model
    if not isinstance(model, ConfiguredModel):
        return f"{model.path}, whole"
    keys = ("hidden_size", "n_embd", "d_model", "num_hidden_layers", "n_layer", "num_layers")
    sizes = [f"{key} {model.settings[key]}" for key in keys if key in model.settings]
    return f"{model.architecture} ({', '.join(sizes)})"


@dataclass
class _Runs:
    """Runs the proof's recipe, each time below a folder of its own."""

    recipe: Recipe
    inputs: Inputs
    out: Path
    pool: WorkerPool
    say: Say

    def train(
        self,
        name: str,
        layout: Layout,
        *,
        micro: int = 1,
        double: bool = False,
        mistake: str | None = None,
    ) -> Recording:
        """One run from its start."""
        self.say(f"{name}: {layout}")
        run = self.out / name
        run.mkdir(parents=True)
        recipe = with_layout(self.recipe, layout)
        self._run(
            run,
            recipe,
            proof_decision(recipe, layout, micro=micro),
            double=double,
            instruments=Instruments(record=True, mistake=mistake),
        )
        return Recording(run)

    def resume(self, recording: Recording, *, at: int) -> list[float]:
        """Losses of one worker that goes on from the checkpoint of step `at`."""
        self.say(f"back: one worker goes on from step {at}")
        run = self.out / "back"
        (run / "checkpoints").mkdir(parents=True)
        saved = f"checkpoints/step-{at:08d}"
        (recording.run / saved).rename(run / saved)
        recipe = with_layout(self.recipe, Layout())
        self._run(run, recipe, proof_decision(recipe, Layout()), resume=True)
        return Recording(run).losses

    def _run(self, run: Path, recipe: Recipe, decision: Decision, **more: Any) -> None:
        (run / "config.yaml").write_text(to_yaml(recipe), encoding="utf-8")
        job = Job(recipe, run, self.inputs, decision, final_model=False, **more)
        attempt = run_workers(job, pool=self.pool, console=Console(out=io.StringIO()))
        if attempt.done is None:
            raise WorkerError(f"{run.name}: the workers ended without finishing")
