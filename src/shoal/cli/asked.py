"""What `shoal plan` and `shoal simulate` are asked: their common arguments, and the search."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.core import TyperGroup

from shoal.errors import UserError, nearest

if TYPE_CHECKING:
    from shoal.plan.cost.step import Estimator
    from shoal.plan.measurements import Measurements
    from shoal.plan.search import Found, Space
    from shoal.plan.workload import Workload


class DefaultCommand(TyperGroup):
    """A group whose first word may be an argument of its command `for`, which needs no name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the name of the default command in front unless a command or help is asked for."""
        if args and args[0] not in self.commands and args[0] not in {"--help", "-h"}:
            args = ["for", *args]
        return super().parse_args(ctx, args)


@dataclass(kw_only=True)
class Asked:
    """What the command line asks to plan for, whichever way it was said."""

    recipe: Annotated[
        str | None, typer.Argument(help="A shipped recipe or a YAML file; or give --model.")
    ] = None
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value overrides.")] = None
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", help="'16x8xH100, 400Gbit', or a YAML file; else this machine."),
    ] = None
    model: Annotated[
        Path | None, typer.Option("--model", help="A config.json, without recipe.")
    ] = None
    sequence: Annotated[int | None, typer.Option("--sequence", help="Tokens per row.")] = None
    batch: Annotated[int | None, typer.Option("--batch", help="Rows per optimizer step.")] = None
    precision: Annotated[
        str | None, typer.Option("--precision", help="fp32, bf16, fp16, fp8 or fp4.")
    ] = None
    software: Annotated[
        str, typer.Option("--software", help="Whose habits to assume: shoal, megatron, fsdp, ...")
    ] = "shoal"
    fix: Annotated[
        list[str] | None,
        typer.Option("--fix", help="Fix a choice: tensor=2, schedule=1f1b; may be repeated."),
    ] = None

    @functools.cached_property
    def measured(self) -> Measurements | None:
        """This machine, when no cluster is given. Raises UserError when it was never measured."""
        from shoal.plan.calibrate import this_machine

        return None if self.cluster else this_machine()

    @functools.cached_property
    def _request(self) -> tuple[Workload, Space]:
        """What is to be computed, and the choices that the recipe and --fix have made."""
        if (self.recipe is None) == (self.model is None):
            raise UserError(
                "give either a recipe (a shipped name or a YAML file) or --model config.json"
            )
        if self.recipe is not None:
            return self._from_recipe(self.recipe)
        from shoal.plan.ask import read_config
        from shoal.plan.search import Space

        config = read_config(Path(str(self.model)))
        if not self.sequence or not self.batch:
            raise UserError("with --model, give --sequence (tokens per row) and --batch (rows)")
        return self._workload(config, None), Space(fixed=self._fixed({}))

    @property
    def _best_format(self) -> str:
        from shoal.plan.calibrate import fastest_format

        return fastest_format(self.measured)[0] if self.measured else "bf16"

    def _from_recipe(self, name: str) -> tuple[Workload, Space]:
        from shoal.config.load import load_recipe
        from shoal.engine.decision import given_layout
        from shoal.plan.ask import choices_of, config_of
        from shoal.plan.search import Space
        from shoal.plan.workload import FORMATS
        from shoal.tasks.kinds import create

        recipe = load_recipe(name, self.overrides or [])
        self.sequence = self.sequence or recipe.data.sequence_tokens
        self.batch = self.batch or recipe.train.global_batch_samples
        folder = None
        if recipe.model.kind == "pretrained":
            from shoal.engine.prepare import model_folder

            folder = model_folder(recipe.model.path, say=typer.echo)
        config = config_of(recipe, folder=folder, task=create(recipe.task.kind).config_keys())
        layout = given_layout(recipe)
        space = choices_of(recipe, layout=layout, only_replicate=self.cluster is None)
        workload = self._workload(config, FORMATS.get(recipe.precision.compute))
        return workload, Space(fixed=self._fixed(space.fixed))

    def _workload(self, config: Mapping[str, Any], stated: str | None) -> Workload:
        from shoal.legal import facts_from_config
        from shoal.plan.workload import Workload

        formats = ("fp32", "bf16", "fp16", "fp8", "fp4")
        precision = self.precision or stated or self._best_format
        if precision not in formats:
            raise UserError(f"--precision {precision!r}: {nearest(precision, formats)}")
        assert self.sequence and self.batch, "given, or taken from the recipe"
        return Workload(
            facts=facts_from_config(config),
            sequence_tokens=self.sequence,
            global_batch_samples=self.batch,
            precision=precision,
        )

    def _fixed(self, choices: Mapping[str, object]) -> dict[str, object]:
        """`choices` and those of --fix."""
        from shoal.legal import CODECS, POLICIES
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

    @property
    def space(self) -> Space:
        """The choices that are left to the search."""
        return self._request[1]

    def found(self) -> tuple[Found, Estimator]:
        """The best plans, and the cost model that they were found with.

        Raises UserError for what is missing, unknown, or does not fit.
        """
        from shoal.plan.calibrate import estimator_for
        from shoal.plan.cost.step import Estimator
        from shoal.plan.hardware import parse_cluster
        from shoal.plan.machine import find_here
        from shoal.plan.search import find
        from shoal.plan.software import PROFILES

        if self.software not in PROFILES:
            raise UserError(f"--software {self.software!r}: {nearest(self.software, PROFILES)}")
        workload, space = self._request
        if self.measured is None:
            cluster = parse_cluster(str(self.cluster))
            estimator = Estimator(workload, cluster, PROFILES[self.software])
            return find(estimator, space=space), estimator
        found = find_here(self.measured, workload=workload, space=space)
        crew = found.best.candidate.crew
        assert crew is not None, "plans of a machine have crews"
        return found, estimator_for(self.measured, crew, workload=workload)


def asking(command: Callable[..., None]) -> Callable[..., None]:
    """A command line for `command(asked, **own)`: the arguments of `Asked`, then its own."""
    hints = get_type_hints(Asked, include_extras=True)
    shared = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=each.default,
            annotation=hints[each.name],
        )
        for each in fields(Asked)
    ]
    signature = inspect.signature(command, eval_str=True)
    own = list(signature.parameters.values())[1:]

    def run(**given: Any) -> None:
        command(Asked(**{each.name: given.pop(each.name) for each in shared}), **given)

    run.__doc__ = command.__doc__
    run.__signature__ = signature.replace(parameters=[*shared, *own])  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in [*shared, *own]}
    return run
