"""`shoal plan`: choose a layout for a recipe on a cluster, say why; score the model on a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from shoal.errors import UserError, nearest

if TYPE_CHECKING:
    from shoal.plan.cost.step import Estimator, Prediction
    from shoal.plan.search import Space


class DefaultCommand(TyperGroup):
    """A group whose first word may be an argument of its command `for`, which needs no name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the name of the default command in front unless a command or help is asked for."""
        if args and args[0] not in self.commands and args[0] not in {"--help", "-h"}:
            args = ["for", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=DefaultCommand,
    help="Choose the layout for a recipe on a cluster: `shoal plan RECIPE --cluster 16x8xH100`.",
    no_args_is_help=True,
)

Recipe = Annotated[
    str | None, typer.Argument(help="A shipped recipe or a YAML file; or give --model.")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value overrides.")]
Spec = Annotated[
    str | None,
    typer.Option("--cluster", help="'16x8xH100, 400Gbit', or a YAML file; else this machine."),
]
ModelFile = Annotated[Path | None, typer.Option("--model", help="A config.json, without recipe.")]
Sequence = Annotated[int | None, typer.Option("--sequence", help="Tokens per row.")]
Batch = Annotated[int | None, typer.Option("--batch", help="Rows per optimizer step.")]
Precision = Annotated[str | None, typer.Option("--precision", help="fp32, bf16, fp16, fp8 or fp4.")]
Program = Annotated[
    str, typer.Option("--software", help="Whose habits to assume: shoal, megatron, fsdp, ...")
]
Fixed = Annotated[
    list[str] | None,
    typer.Option("--fix", help="Fix a choice: tensor=2, schedule=1f1b; may be repeated."),
]


@app.command("for")
def plan(
    recipe: Recipe = None,
    overrides: Overrides = None,
    cluster: Spec = None,
    model: ModelFile = None,
    sequence: Sequence = None,
    batch: Batch = None,
    precision: Precision = None,
    software: Program = "shoal",
    fix: Fixed = None,
    goal: Annotated[str, typer.Option(help="speed, cost or devices.")] = "speed",
    tokens: Annotated[str | None, typer.Option(help="Length of the run, such as 2B.")] = None,
    deadline: Annotated[str | None, typer.Option(help="Longest time, such as 8h.")] = None,
    budget: Annotated[float | None, typer.Option(help="Most US dollars.")] = None,
    image: Annotated[Path | None, typer.Option("--picture", help="Write an SVG here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Choose a layout, predict its time and memory, and say why the others lose."""
    from shoal.plan import explain
    from shoal.plan.search import find

    asked = Asked(
        recipe=recipe,
        overrides=overrides or [],
        spec=cluster,
        model=model,
        sequence=sequence,
        batch=batch,
        precision=precision,
        software=software,
    )
    estimator, fixed = asked.estimator(), asked.fixed(fix or [])
    if tokens:
        _whole_run(
            estimator,
            space=fixed,
            tokens=tokens,
            limits=(goal, deadline, budget),
            as_json=as_json,
        )
        return
    found = find(estimator, space=fixed)
    if image is not None:
        image.write_text(explain.picture(found))
    missing = _not_yet(found.best) if software == "shoal" else []
    if as_json:
        report = explain.report_json(found, cluster=estimator.cluster)
        typer.echo(json.dumps({**report, "not_yet": missing}, indent=1))
        return
    typer.echo(explain.text(found, estimator=estimator))
    for line in missing:
        typer.echo(f"Not to be run today: {line}")


def _not_yet(best: Prediction) -> list[str]:
    """What of a plan shoal itself cannot run yet."""
    from shoal.legal import not_yet

    candidate = best.candidate
    found = not_yet(candidate.layout, policy=candidate.policy, codec=candidate.codec)
    return [f"{problem.what}; {problem.hint}" for problem in found]


def _whole_run(
    estimator: Estimator,
    *,
    space: Space,
    tokens: str,
    limits: tuple[str, str | None, float | None],
    as_json: bool,
) -> None:
    """Time and price of a run on each number of devices, and which one serves the goal."""
    from shoal.plan import explain
    from shoal.plan.search import GOALS, choose, offers
    from shoal.units import parse_count, parse_seconds

    goal, deadline, budget = limits
    if goal not in GOALS:
        raise UserError(f"--goal {goal!r}: {nearest(goal, GOALS)}")
    try:
        count = parse_count(tokens)
        longest = parse_seconds(deadline) if deadline else None
    except ValueError as error:
        raise UserError(f"--tokens or --deadline: {error}") from error
    made = offers(estimator, tokens=count, space=space)
    chosen = choose(made, goal=goal, deadline=longest, budget=budget)
    if not as_json:
        typer.echo(explain.offers_text(made, chosen=chosen, tokens=count))
        if chosen is not None:
            typer.echo(f"Plan: {explain.choices(chosen.prediction.candidate)}")
        return
    rows = [
        {
            "workers": offer.cluster.workers,
            "seconds": offer.seconds,
            "price": offer.price or None,
            "chosen": offer is chosen,
            "plan": explain.to_json(offer.prediction),
        }
        for offer in made
    ]
    typer.echo(json.dumps({"tokens": count, "goal": goal, "offers": rows}, indent=1))


@app.command("score")
def score(
    table: Annotated[Path, typer.Argument(help="A CSV table of published measurements.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    leave_out: Annotated[
        bool, typer.Option("--leave-out", help="Also fit without each source in turn (a minute).")
    ] = False,
) -> None:
    """Score the cost model on published measurements: time, memory, ranking, what fits."""
    from shoal.plan import score as scoring

    result = scoring.summary(scoring.score_table(table))
    if leave_out:
        from shoal.plan.fit import leave_one_out

        result["left_out"] = leave_one_out(table)
    typer.echo(json.dumps(result, indent=1) if as_json else scoring.text(result))


@dataclass(kw_only=True)
class Asked:
    """What the command line asks to plan for, whichever way it was said."""

    recipe: str | None
    overrides: list[str]
    spec: str | None
    model: Path | None
    sequence: int | None
    batch: int | None
    precision: str | None
    software: str
    choices: dict[str, object] = field(default_factory=dict)

    def _config(self) -> Mapping[str, Any]:
        if (self.recipe is None) == (self.model is None):
            raise UserError(
                "give either a recipe (a shipped name or a YAML file) or --model config.json"
            )
        return self._from_recipe(self.recipe) if self.recipe else _read_json(self.model)

    def _from_recipe(self, name: str) -> Mapping[str, Any]:
        from shoal.config.load import load_recipe

        recipe = load_recipe(name, self.overrides)
        self.sequence = self.sequence or recipe.data.sequence_tokens
        self.batch = self.batch or recipe.train.global_batch_samples
        names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "auto": "bf16"}
        self.precision = self.precision or names[recipe.precision.compute]
        for axis in ("replicate", "shard", "context", "tensor", "pipeline", "expert"):
            degree = getattr(recipe.parallel, axis)
            if degree is not None:
                self.choices[axis] = degree
        if recipe.train.micro_batch_samples != "auto":
            self.choices["micro_batch_samples"] = recipe.train.micro_batch_samples
        return _config_of(recipe)

    def estimator(self) -> Estimator:
        """The cost model for what was asked; raises UserError for what is missing or unknown."""
        from shoal.legal import facts_from_config
        from shoal.plan.calibrate import this_machine
        from shoal.plan.cost.step import Estimator
        from shoal.plan.hardware import parse_cluster
        from shoal.plan.software import PROFILES
        from shoal.plan.workload import Workload

        config = self._config()
        if not self.sequence or not self.batch:
            raise UserError("with --model, give --sequence (tokens per row) and --batch (rows)")
        precision = self.precision or "bf16"
        formats = ("fp32", "bf16", "fp16", "fp8", "fp4")
        if precision not in formats:
            raise UserError(f"--precision {precision!r}: {nearest(precision, formats)}")
        if self.software not in PROFILES:
            raise UserError(f"--software {self.software!r}: {nearest(self.software, PROFILES)}")
        workload = Workload(
            facts=facts_from_config(config),
            sequence_tokens=self.sequence,
            global_batch_samples=self.batch,
            precision=precision,
        )
        cluster = parse_cluster(self.spec) if self.spec else this_machine()
        return Estimator(workload, cluster, PROFILES[self.software])

    def fixed(self, pairs: list[str]) -> Space:
        """The search space with the choices of the recipe and of --fix."""
        from shoal.legal import CODECS, POLICIES
        from shoal.plan.search import Space
        from shoal.plan.workload import LEVELS, RECOMPUTE, SCHEDULES

        known = ("replicate", "shard", "context", "tensor", "pipeline", "expert")
        words = {
            "schedule": SCHEDULES,
            "recompute": RECOMPUTE,
            "level": LEVELS,
            "policy": POLICIES,
            "codec": CODECS,
        }
        counts = (*known, "micro_batch_samples", "every_steps")
        for pair in pairs:
            name, _, value = pair.partition("=")
            if name in words:
                if value not in words[name]:
                    raise UserError(f"--fix {pair!r}: {nearest(value, words[name])}")
                self.choices[name] = value
            elif name in counts and value.isdigit() and int(value):
                self.choices[name] = int(value)
            else:
                raise UserError(
                    f"--fix {pair!r}: expected NAME=VALUE with one of "
                    f"{', '.join((*counts, *words))}"
                )
        return replace(Space(), fixed=self.choices)


def _config_of(recipe: Any) -> Mapping[str, Any]:
    """The keys of config.json of a recipe's model, with the vocabulary of its tokenizer."""
    model = recipe.model
    if model.kind == "pretrained":
        return _read_json(Path(model.path) / "config.json")
    vocabulary = recipe.data.tokenizer.vocabulary_size
    return {"vocab_size": vocabulary, **model.settings, "model_type": model.architecture}


def _read_json(path: Path | None) -> Mapping[str, Any]:
    try:
        data = json.loads(Path(str(path)).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as a config.json ({error}). Give the file of the model, or "
            "the folder that holds it as model.path."
        ) from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object of model settings")
    return data
