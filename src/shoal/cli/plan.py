"""`shoal plan`: choose a layout for a recipe on a cluster, and say why."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from typing import Annotated

import typer

from shoal.cli.plan_arguments import (
    OTHER_MACHINES,
    AsJson,
    Batch,
    Devices,
    Fix,
    Model,
    Overrides,
    Picture,
    PlanArguments,
    Precision,
    RecipeName,
    Sequence,
)
from shoal.cli.terminal import say
from shoal.errors import UserError, nearest


def plan(
    recipe: RecipeName = None,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", help="Such as '16x8xH100, 400Gbit'; else this machine."),
    ] = None,
    devices: Devices = None,
    model: Model = None,
    sequence: Sequence = None,
    batch: Batch = None,
    precision: Precision = None,
    fix: Fix = None,
    goal: Annotated[
        str, typer.Option(help="One of speed, cost and devices; with --tokens.")
    ] = "speed",
    tokens: Annotated[str | None, typer.Option(help="Length of the run, such as 2B.")] = None,
    deadline: Annotated[str | None, typer.Option(help="Longest time, such as 8h.")] = None,
    budget: Annotated[float | None, typer.Option(help="Most US dollars.")] = None,
    image: Picture = None,
    as_json: AsJson = False,
) -> None:
    """Choose how a recipe is run, and print the command that runs it.

    shoal plan RECIPE times it on this machine. shoal plan RECIPE --cluster 16x8xH100 predicts its
    time and memory there, and says why other layouts lose.
    """
    from shoal.plan import explain, picture

    if not cluster:
        beside: dict[str, object] = {
            "--model": model,
            "--devices": devices,
            "--precision": precision,
            "--fix": fix,
        }
        beside |= {"--tokens": tokens, "--picture": image, "--sequence": sequence, "--batch": batch}
        _here(recipe, overrides or [], beside=beside, as_json=as_json)
        return
    given = PlanArguments(
        cluster=cluster,
        recipe=recipe,
        overrides=overrides,
        devices=devices,
        model=model,
        sequence=sequence,
        batch=batch,
        precision=precision,
        fix=fix,
    )
    if tokens:
        _whole_run(given, tokens=tokens, limits=(goal, deadline, budget), as_json=as_json)
        return
    found = given.found()
    if image is not None:
        picture.plans(found).savefig(image)
    if as_json:
        report = explain.report_json(found, cluster=given.estimator.cluster)
        more = {"not_yet": given.lacking, "command": given.command(found.best) or None}
        say(json.dumps({**report, **more}, indent=1), verbatim=True)
        return
    say(
        explain.text(
            found,
            estimator=given.estimator,
            anywhere=given.found_anywhere(),
            missing=given.lacking,
            today=given.today(found.best),
        )
    )


def _here(
    recipe: str | None, overrides: list[str], *, beside: Mapping[str, object], as_json: bool
) -> None:
    """The choice for this machine: on a CPU what was timed, on devices what is predicted."""
    needless = [name for name, value in beside.items() if value]
    if needless or recipe is None:
        what = f"{', '.join(needless)} " if needless else "a plan without a recipe "
        raise UserError(
            f"{what}needs --cluster, such as 8xH100; "
            "without one, shoal plan RECIPE times the recipe on this machine"
        )
    from shoal.launch.pool import WorkerPool

    with WorkerPool() as pool:  # before anything else is imported: its own imports take longest
        from shoal.launch.candidates import Timed, best_of, table
        from shoal.launch.local import plan_here
        from shoal.observe.console import Console

        decision = plan_here(
            recipe, overrides, pool=pool, console=Console(out=sys.stderr if as_json else None)
        )
    if as_json:
        say(json.dumps(decision.to_json(), indent=1), verbatim=True)
        return
    rows = [Timed.from_json(row) for row in decision.measured.get("candidates", [])]
    say(f"Plan: {decision}")
    if rows:
        say("\n".join(table(rows, best=best_of(rows))))
    say(f"  {shlex.join(['shoal', 'train', recipe, *overrides])}")


def _whole_run(
    given: PlanArguments,
    *,
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
    made = offers(given.estimator, tokens=count, space=given.space)
    chosen = choose(made, goal=goal, deadline=longest, budget=budget)
    if not as_json:
        say(explain.offers_text(made, chosen=chosen, tokens=count))
        if chosen is not None:
            run = given.command(chosen.prediction)
            what = explain.choices(chosen.prediction.candidate)
            lacking = "; ".join(given.missing) or OTHER_MACHINES
            unable = f"Not in shoal yet: {lacking}\nIt would be: {what}"
            say(f"Plan: {what}\n  {run}" if run else unable)
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
    whole = {"tokens": count, "goal": goal, "offers": rows}
    say(json.dumps(whole, indent=1), verbatim=True)
