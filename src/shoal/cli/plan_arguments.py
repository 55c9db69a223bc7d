"""What `shoal plan` and `shoal simulate` are given: their common arguments, and the search."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.terminal import tell
from shoal.errors import UserError, nearest

if TYPE_CHECKING:
    from shoal.plan.cost.step import Estimator, Prediction
    from shoal.plan.search import Found, Space
    from shoal.plan.workload import Workload

OTHER_MACHINES = "workers on other machines"
"""What is lacking wherever a plan needs more than one."""

RecipeName = Annotated[
    str | None, typer.Argument(help="A shipped recipe or a YAML file; or give --model.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as parallel.tensor=2."),
]
Devices = Annotated[
    Path | None, typer.Option("--devices", help="A CSV table of devices of your own.")
]
Model = Annotated[Path | None, typer.Option("--model", help="A config.json, without recipe.")]
Sequence = Annotated[int | None, typer.Option("--sequence", help="Tokens per row.")]
Batch = Annotated[int | None, typer.Option("--batch", help="Rows per optimizer step.")]
Precision = Annotated[
    str | None, typer.Option("--precision", help="One of fp32, bf16, fp16, fp8 and fp4.")
]
Fix = Annotated[
    list[str] | None,
    typer.Option("--fix", help="Fix a choice: tensor=2, recompute=full; may be repeated."),
]
Picture = Annotated[Path | None, typer.Option("--picture", help="Draw it: FILE.svg or .png.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(kw_only=True)
class PlanArguments:
    """What is to be planned for, whichever way it was said."""

    cluster: str
    _closed: dict[str, object] = field(default_factory=dict, init=False)
    """Axes that the recipe's other choices (an optimizer, exact mode) rule out: degree 1."""
    recipe: str | None = None
    overrides: list[str] | None = None
    devices: Path | None = None
    model: Path | None = None
    sequence: int | None = None
    batch: int | None = None
    precision: str | None = None
    fix: list[str] | None = None

    @functools.cached_property
    def _request(self) -> tuple[Workload, dict[str, object]]:
        """What is to be computed, and the choices that the recipe and --fix have made."""
        if (self.recipe is None) == (self.model is None):
            raise UserError(
                "give either a recipe (a shipped name or a YAML file) or --model config.json"
            )
        if self.recipe is not None:
            return self._from_recipe(self.recipe)
        from shoal.plan.from_recipe import read_config

        config = read_config(Path(str(self.model)))
        if not self.sequence or not self.batch:
            raise UserError("with --model, give --sequence (tokens per row) and --batch (rows)")
        return self._workload(config, None), self._fixed({})

    def _from_recipe(self, name: str) -> tuple[Workload, dict[str, object]]:
        from shoal.config.load import load_recipe
        from shoal.engine.decision import given_layout
        from shoal.launch.devices import space_of
        from shoal.plan.from_recipe import choices_of, config_of
        from shoal.plan.workload import FORMATS
        from shoal.tasks.kinds import create

        recipe = load_recipe(name, self.overrides or [])
        self.sequence = self.sequence or recipe.data.sequence_tokens
        self.batch = self.batch or recipe.train.global_batch_samples
        folder = None
        if recipe.model.kind == "pretrained":
            from shoal.launch.prepare import model_folder

            folder = model_folder(recipe.model.path, say=tell)
        config = config_of(recipe, folder=folder, task=create(recipe.task.kind).config_keys())
        layout = given_layout(recipe)
        self._closed = space_of(recipe, layout=layout).fixed
        fixed = choices_of(recipe, layout=layout).fixed
        return self._workload(config, FORMATS.get(recipe.precision.compute)), self._fixed(fixed)

    def _workload(self, config: Mapping[str, Any], stated: str | None) -> Workload:
        from shoal.legal import facts_from_config
        from shoal.plan.workload import WIDER, Workload

        precision = self.precision or stated or "bf16"
        if precision not in WIDER:
            raise UserError(f"--precision {precision!r}: {nearest(precision, WIDER)}")
        assert self.sequence and self.batch, "given, or taken from the recipe"
        facts = facts_from_config(config)
        return Workload(
            facts=facts,
            sequence_tokens=facts.fixed_tokens or self.sequence,
            global_batch_samples=self.batch,
            precision=precision,
        )

    def _fixed(self, choices: Mapping[str, object]) -> dict[str, object]:
        """`choices` and those of --fix."""
        from shoal.legal.rules import CODECS, POLICIES
        from shoal.plan.workload import DEGREES, LEVELS, RECOMPUTE, SCHEDULES

        words = {
            "schedule": SCHEDULES,
            "recompute": RECOMPUTE,
            "level": LEVELS,
            "policy": POLICIES,
            "codec": CODECS,
        }
        counts = (*DEGREES, "micro_batch_samples", "every_steps")
        fixed = dict(choices)
        for pair in self.fix or []:
            name, _, value = pair.partition("=")
            if name in words:
                if value not in words[name]:
                    raise UserError(f"--fix {pair!r}: {nearest(value, words[name])}")
                fixed[name] = value
            elif name in counts and value.isdigit() and int(value):
                fixed[name] = int(value)
            else:
                raise UserError(
                    f"--fix {pair!r}: expected NAME=VALUE with one of "
                    f"{', '.join((*counts, *words))}"
                )
        return fixed

    @functools.cached_property
    def estimator(self) -> Estimator:
        """The cost model. Raises UserError for what is missing or unknown."""
        from shoal.plan.cost.step import Estimator
        from shoal.plan.hardware import parse_cluster

        workload, _ = self._request
        cluster = parse_cluster(self.cluster, devices=self.devices)
        return Estimator(workload, cluster)

    @functools.cached_property
    def missing(self) -> list[str]:
        """What of the fixed choices shoal cannot run today, each with a reason."""
        from shoal.layout import Layout
        from shoal.legal import Combination, not_yet
        from shoal.plan.workload import DEGREES

        workload, fixed = self._request
        try:
            layout = Layout(**{axis: int(str(fixed.get(axis, 1))) for axis in DEGREES})
        except ValueError as error:
            raise UserError(f"--fix: {error}") from error
        policy, codec = str(fixed.get("policy", "every-step")), str(fixed.get("codec", "none"))
        asked = Combination(layout=layout, policy=policy, codec=codec)
        found = not_yet(asked.of_model(workload.facts))
        return [f"{problem.what}; {problem.hint}" for problem in found]

    @functools.cached_property
    def lacking(self) -> list[str]:
        """What the plan needs and shoal lacks today: `missing`, and other machines."""
        cluster = self.estimator.cluster
        if cluster.workers <= cluster.node_devices:
            return self.missing
        return [*self.missing, OTHER_MACHINES]

    def today(self, best: Prediction) -> list[str]:
        """What runs today: the command of `best`; of several machines, the best plan on one."""
        from shoal.plan.explain import alone_note, choices, format_seconds_fine
        from shoal.plan.search import find

        alone = alone_note(self.estimator, best=best, space=self.space)
        lines = [alone] if alone else []
        if not self.lacking:
            return [f"  {self.command(best)}", *lines]
        if self.missing:
            return lines
        cluster = self.estimator.cluster
        one = replace(cluster, groups=(replace(cluster.groups[0], count=1),))
        try:
            here = find(replace(self.estimator, cluster=one), space=self.space).best
        except UserError:
            return ["Today it runs on one machine, and does not fit on one of these."]
        seconds = format_seconds_fine(here.step_seconds)
        said = f"Today, on one of them: {choices(here.candidate)}; {seconds} a step (predicted)"
        return [said, f"  {self.command(here)}", *lines]

    @functools.cached_property
    def space(self) -> Space:
        """The choices left to the search: of shoal, those it can run, unless others were fixed."""
        from shoal.plan.search import Space

        fixed = self._request[1]
        if self.missing:
            return Space(fixed=fixed)
        return Space(fixed={**self._closed, **fixed}, runnable=True)

    def found(self) -> Found:
        """The best plans. Raises UserError for what is missing, unknown, or does not fit."""
        from shoal.plan.search import find

        return find(self.estimator, space=self.space)

    def command(self, best: Prediction) -> str:
        """The command line that runs `best`; empty where shoal cannot run it today."""
        from shoal.plan.explain import command

        if self.missing or best.workers > self.estimator.cluster.node_devices:
            return ""
        return command(
            best.candidate, recipe=self.recipe or "RECIPE", overrides=self.overrides or []
        )

    def found_anywhere(self) -> Found | None:
        """The best plans with what shoal cannot run yet; None where that was searched already."""
        from shoal.plan.search import Space, find

        if not self.space.runnable:
            return None
        return find(self.estimator, space=Space(fixed=self._request[1]))
