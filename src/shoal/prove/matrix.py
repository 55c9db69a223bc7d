"""Many layouts of one recipe, each held against one worker: docs/evidence/parity.md is made of it.

Where `shoal parity` judges one layout by tolerances of its own, this gives figures: how far losses,
norms, gradients and weights are from those of one worker, from one seed and the same samples.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from shoal.config.anchor import anchored
from shoal.config.load import apply_overrides, load_recipe, recipe_from
from shoal.config.recipe import Recipe
from shoal.engine.decision import given_layout
from shoal.launch.pool import WorkerPool
from shoal.launch.prepare import prepare_inputs
from shoal.layout import Layout
from shoal.observe.events import read_lines
from shoal.prove.recording import Recording, figures_of, relative
from shoal.prove.runs import Runs, Say
from shoal.prove.subject import proof_recipe


@dataclass(frozen=True)
class Apart:
    """How far a layout was from one worker, as relative differences.

    `loss` and `norm`: the largest over the steps, evaluations among the losses. `gradient`: the
    largest over all parameters by the rule of docs/design/determinism.md, at the first step, and
    `where`; `last_gradient`: at the last. `parameter`: of the weights at the end.
    """

    loss: float
    norm: float
    gradient: float
    where: str
    last_gradient: float
    parameter: float
    begins_equal: bool


class Matrix:
    """The layouts of one recipe; the run of one worker is made once."""

    def __init__(
        self,
        recipe: str | Path,
        *,
        out: Path,
        pool: WorkerPool,
        steps: int = 5,
        samples: int = 8,
        say: Say = lambda text: None,
    ) -> None:
        """`samples`: of a step. Raises the errors of reading the recipe and its data."""
        given = anchored(load_recipe(str(recipe), ["parallel={replicate: 1}"]))
        inputs = prepare_inputs(given, say=say)
        proof = proof_recipe(
            given, inputs=inputs, layout=Layout(), steps=steps, whole=True, samples=samples
        )
        # an evaluation between steps gathers weights, and must leave none of them behind
        self._recipe = _changed(proof, ["train.evaluate_every_steps=2"])
        self._runs = Runs(inputs, out, pool, say)
        self._one: Recording | None = None
        self._count = 0

    def compare(self, overrides: Iterable[str], *, mistake: str | None = None) -> Apart:
        """Train under `overrides` (of `parallel` and `launch`), and set it beside one worker.

        `mistake`: plant one. Raises ConfigError for overrides that are none, WorkerError.
        """
        if self._one is None:
            self._one = self._runs.train("one", self._recipe, Layout())
        recipe = _changed(self._recipe, overrides)
        self._count += 1
        layout, name = given_layout(recipe), f"layout-{self._count:03d}"
        found = self._runs.train(name, recipe, layout, mistake=mistake)
        apart = _apart(found, self._one)
        shutil.rmtree(found.run)
        return apart


def _changed(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    tree = apply_overrides(recipe.model_dump(mode="json"), overrides)
    return recipe_from(tree, source="the layout")


def _apart(found: Recording, wanted: Recording) -> Apart:
    figures = figures_of(found, wanted)
    first, last = figures.gradients[0], figures.gradients[-1]
    where = max(first, key=first.__getitem__)
    scores = zip(_evaluations(found), _evaluations(wanted), strict=True)
    return Apart(
        loss=max([*figures.losses, *(relative(a, b) for a, b in scores)]),
        norm=max(figures.norms),
        gradient=first[where],
        where=where,
        last_gradient=max(last.values()),
        parameter=max(figures.parameters.values()),
        begins_equal=figures.begins_equal,
    )


def _evaluations(recording: Recording) -> list[float]:
    rows = read_lines(recording.run / "metrics.jsonl")
    return [row["evaluation_loss"] for row in rows if "evaluation_loss" in row]
