"""`shoal plan`: choose a layout for a recipe on a cluster, say why; score the model on a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.asked import Asked, DefaultCommand, asking
from shoal.errors import UserError, nearest

if TYPE_CHECKING:
    from shoal.plan.cost.step import Prediction

app = typer.Typer(
    cls=DefaultCommand,
    help="Choose the layout for a recipe on a cluster: `shoal plan RECIPE --cluster 16x8xH100`. "
    "`shoal plan --calibrate` measures this machine; with runs, it learns from them.",
    no_args_is_help=True,
)


@app.command("for")
@asking
def plan(
    asked: Asked,
    goal: Annotated[str, typer.Option(help="speed, cost or devices.")] = "speed",
    tokens: Annotated[str | None, typer.Option(help="Length of the run, such as 2B.")] = None,
    deadline: Annotated[str | None, typer.Option(help="Longest time, such as 8h.")] = None,
    budget: Annotated[float | None, typer.Option(help="Most US dollars.")] = None,
    image: Annotated[Path | None, typer.Option("--picture", help="Write an SVG here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine; with RUNs, learn from them.")
    ] = False,
) -> None:
    """Choose a layout, predict its time and memory, and say why the others lose."""
    from shoal.plan import explain

    if calibrate:
        runs = [Path(word) for word in [asked.recipe, *(asked.overrides or [])] if word]
        _calibrate(runs, as_json=as_json)
        return
    if tokens:
        _whole_run(asked, tokens=tokens, limits=(goal, deadline, budget), as_json=as_json)
        return
    found, estimator = asked.found()
    if image is not None:
        image.write_text(explain.picture(found))
    missing = _not_yet(found.best) if asked.software == "shoal" else []
    if as_json:
        report = explain.report_json(found, cluster=estimator.cluster)
        typer.echo(json.dumps({**report, "not_yet": missing}, indent=1))
        return
    typer.echo(explain.text(found, estimator=estimator))
    for line in missing:
        typer.echo(f"Not to be run today: {line}")


def _calibrate(runs: list[Path], *, as_json: bool) -> None:
    """Measure this machine, or fold runs in; then say what is known of it."""
    from shoal.launch.measuring import learn_from, measure_machine
    from shoal.launch.pool import WorkerPool
    from shoal.observe.console import Console
    from shoal.plan.explain import machine_text
    from shoal.plan.measurements import measurements_path

    if runs:
        measured = learn_from(runs)
    else:
        console = Console(out=sys.stderr if as_json else None)
        with WorkerPool() as pool:
            console.phase("measuring this machine (under a minute)")
            measured = measure_machine(pool=pool, console=console)
            console.phase(f"kept in {measurements_path()}")
    typer.echo(json.dumps(measured.to_json()) if as_json else machine_text(measured))


def _not_yet(best: Prediction) -> list[str]:
    """What of a plan shoal itself cannot run yet."""
    from shoal.legal import Combination, not_yet

    candidate = best.candidate
    found = not_yet(
        Combination(layout=candidate.layout, policy=candidate.policy, codec=candidate.codec)
    )
    return [f"{problem.what}; {problem.hint}" for problem in found]


def _whole_run(
    asked: Asked,
    *,
    tokens: str,
    limits: tuple[str, str | None, float | None],
    as_json: bool,
) -> None:
    """Time and price of a run on each number of devices, and which one serves the goal."""
    from shoal.plan import explain
    from shoal.plan.search import GOALS, Offer, choose, offers
    from shoal.units import parse_count, parse_seconds

    goal, deadline, budget = limits
    if goal not in GOALS:
        raise UserError(f"--goal {goal!r}: {nearest(goal, GOALS)}")
    try:
        count = parse_count(tokens)
        longest = parse_seconds(deadline) if deadline else None
    except ValueError as error:
        raise UserError(f"--tokens or --deadline: {error}") from error
    found, estimator = asked.found()
    if asked.measured is None:
        made = offers(estimator, tokens=count, space=asked.space)
    else:  # a machine has its cores, and no price
        seconds = count / found.best.tokens_per_second
        made = [Offer(prediction=found.best, cluster=estimator.cluster, seconds=seconds, price=0.0)]
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
