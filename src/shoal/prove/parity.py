"""`shoal parity`: train the user's model, made small, on one worker and in a layout, and compare.

Runs of the real engine from one seed and the same samples: one worker; one worker that adds other
micro batches; one worker in float64; the layout; and one worker that goes on from the layout's
checkpoint. The second and third say how far apart right runs can be.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from shoal.checkpoint.store import Store
from shoal.config.anchor import anchored
from shoal.config.load import load_recipe
from shoal.config.recipe import ConfiguredModel, Recipe
from shoal.engine.batches import batches_of
from shoal.engine.export import merge
from shoal.engine.instruments.mistakes import MISTAKES
from shoal.engine.opened import loss_of_rows
from shoal.errors import ConfigError, Problem, nearest
from shoal.launch.pool import WorkerPool, pool_or_own
from shoal.launch.prepare import prepare_inputs
from shoal.layout import Layout, Share
from shoal.models.dropout import wants_dropout
from shoal.models.huggingface import config_from
from shoal.prove.certificate import OPENED, Certificate, Failure, judge, tolerance_from
from shoal.prove.diagnose import cause_of
from shoal.prove.recording import Recording, figures_of, relative
from shoal.prove.runs import Runs, Say
from shoal.prove.subject import proof_layout, proof_recipe
from shoal.tasks.kinds import create


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
        runs = Runs(inputs, out, workers, say)
        certificate = _prove(runs, small, layout=layout, steps=steps, mistake=mistake)
    certificate.seconds = time.monotonic() - began
    certificate.versions = {name: version(name) for name in ("shoal", "torch", "transformers")}
    (out / "certificate.json").write_text(json.dumps(certificate.to_json(), indent=1))
    (out / "certificate.txt").write_text(f"{certificate}\n")
    return certificate


def _prove(
    runs: Runs, recipe: Recipe, *, layout: Layout, steps: int, mistake: str | None
) -> Certificate:
    one = runs.train("one", recipe, Layout())
    samples = recipe.train.global_batch_samples
    micro = 2 if samples % 2 == 0 else samples
    reordered = runs.train("reordered", recipe, Layout(), micro=micro)
    float32 = recipe.precision.compute == "float32"
    double = runs.train("double", recipe, Layout(), double=True) if float32 else None
    cut = runs.train("layout", recipe, layout, mistake=mistake)
    tolerance = tolerance_from(
        figures_of(reordered, one),
        figures_of(double, one) if double is not None else None,
        promise=float32,
    )
    figures = figures_of(cut, one)
    failures, largest = judge(figures, tolerance)
    certificate = Certificate(
        layout=str(layout),
        model=_described(recipe),
        steps=steps,
        compute=recipe.precision.compute,
        tolerance=tolerance,
        largest=largest,
        failures=failures,
    )
    if failures:
        certificate.cause = cause_of(cut, one, figures, tolerance, layout=layout)
    elif steps > 1:
        back = runs.resume(cut, recipe, at=max(1, steps // 2))
        wanted = one.losses[-len(back) :]
        apart = max(relative(a, b) for a, b in zip(back, wanted, strict=True))
        certificate.largest["round trip"] = (apart, "one worker goes on from its checkpoint")
        if not apart <= tolerance.loss:
            failures.append(Failure("round trip", "loss", None, apart, tolerance.loss))
            certificate.cause = "the checkpoint does not hold what the layout had"
        if float32:
            _open(certificate, runs, recipe, cut, at=max(1, steps // 2))
    certificate.proven = not failures
    return certificate


def _open(certificate: Certificate, runs: Runs, recipe: Recipe, cut: Recording, *, at: int) -> None:
    """The layout's save, merged and opened by transformers, against the next loss it logged."""
    reader = Store(runs.out / "back" / "checkpoints").open(at)
    config = reader.state["model_config"]
    drops = wants_dropout(config_from(config)) and recipe.model.dropout != "off"
    balanced = config.get("output_router_logits") and recipe.model.balance != "off"
    if drops or balanced:
        return  # where it is opened nothing is dropped, and each document is balanced by itself
    samples = recipe.train.global_batch_samples
    task = create(recipe.task.kind, settings=runs.inputs.task_settings, options=recipe.task)
    if task.plays:
        return  # what it learned from is known to the run alone
    stream = batches_of(recipe, runs.inputs, task=task)
    batch = task.drawn(stream.at(at, Share(0, samples)), seed=recipe.seed)
    rows = [{name: each[row] for name, each in batch.items()} for row in range(samples)]
    folder = runs.out / "opened"
    merge(reader, out=folder)
    apart = relative(loss_of_rows(folder, task=task, rows=rows), cut.losses[at])
    certificate.largest["opened"] = (apart, "transformers, with the merged folder of a save")
    if not apart <= OPENED:
        certificate.failures.append(Failure("opened", "loss", at, apart, OPENED))
        certificate.cause = "the exported model is not the one that was trained"


def _described(recipe: Recipe) -> str:
    model = recipe.model
    if not isinstance(model, ConfiguredModel):
        return f"{model.path}, whole"
    keys = ("hidden_size", "n_embd", "d_model", "num_hidden_layers", "n_layer", "num_layers")
    sizes = [f"{key} {model.settings[key]}" for key in keys if key in model.settings]
    return f"{model.architecture} ({', '.join(sizes)})"
