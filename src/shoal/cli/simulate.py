"""`shoal simulate`: the timeline of a step and the goodput of a long run on a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.plan import (
    Asked,
    Batch,
    DefaultCommand,
    Fixed,
    ModelFile,
    Overrides,
    Precision,
    Program,
    Recipe,
    Sequence,
    Spec,
)

app = typer.Typer(
    cls=DefaultCommand,
    help="Simulate a step and a long run: `shoal simulate RECIPE --cluster 16x8xH100`.",
    no_args_is_help=True,
)


@app.command("for")
def simulate(
    recipe: Recipe = None,
    overrides: Overrides = None,
    cluster: Spec = None,
    model: ModelFile = None,
    sequence: Sequence = None,
    batch: Batch = None,
    precision: Precision = None,
    software: Program = "shoal",
    fix: Fixed = None,
    out: Annotated[
        Path | None, typer.Option("--trace", help="Write a Perfetto trace here.")
    ] = None,
    image: Annotated[Path | None, typer.Option("--picture", help="Write an SVG here.")] = None,
    failure_hours: Annotated[
        float, typer.Option(help="Mean hours between failures of one device.")
    ] = 50_000.0,
    save_seconds: Annotated[float, typer.Option(help="How long a save stops the run.")] = 30.0,
    restart_seconds: Annotated[float, typer.Option(help="From a failure to a new step.")] = 300.0,
    slow_share: Annotated[float, typer.Option(help="Share of replicas that are slow.")] = 0.0,
    slow_factor: Annotated[float, typer.Option(help="How much slower they are.")] = 1.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Play out the best plan (or the one fixed by --fix) and say what a long run would keep."""
    from shoal.plan import goodput
    from shoal.plan import simulate as simulator
    from shoal.plan.explain import choices, to_json
    from shoal.plan.search import find
    from shoal.units import format_seconds

    asked = Asked(recipe, overrides or [], cluster, model, sequence, batch, precision, software)
    estimator, fixed = asked.estimator(), asked.fixed(fix or [])
    best = find(estimator, space=fixed).best
    timeline = simulator.simulate_step(estimator, candidate=best.candidate)
    if out is not None:
        out.write_text(simulator.trace(timeline))
    if image is not None:
        image.write_text(simulator.picture(timeline))
    workers, layout = best.workers, best.candidate.layout
    trust = goodput.Reliability(
        device_failure_seconds=failure_hours * 3600,
        save_seconds=save_seconds,
        restart_seconds=restart_seconds,
    )
    interval = goodput.best_interval_seconds(trust, workers=workers)
    kept = goodput.expected_goodput(trust, workers=workers, interval_seconds=interval)
    jitter = goodput.Jitter(slow_share=slow_share, slow_factor=slow_factor)
    copies = layout.replicate * layout.shard
    waiting = {
        "every-step": goodput.waiting_factor(jitter, replicas=copies),
        "diloco every 100 steps": goodput.waiting_factor(
            jitter, replicas=copies, policy="diloco", every_steps=100
        ),
        "server, 4 steps of staleness": goodput.waiting_factor(
            jitter, replicas=copies, policy="server", staleness=4
        ),
    }
    if as_json:
        report = {
            "plan": to_json(best),
            "simulated_step_seconds": timeline.seconds,
            "bubble": timeline.bubble,
            "failure_seconds": goodput.failure_seconds(trust, workers=workers),
            "checkpoint_seconds": interval,
            "goodput": kept,
            "waiting_factor": waiting,
        }
        typer.echo(json.dumps(report, indent=1))
        return
    failures = goodput.failure_seconds(trust, workers=workers)
    typer.echo(f"Plan: {choices(best.candidate)}")
    typer.echo(
        f"Step: {timeline.seconds:.4g} s simulated, {best.step_seconds:.4g} s predicted, "
        f"{timeline.bubble:.1%} of the passes are bubbles"
    )
    typer.echo(
        f"Long run: a failure every {format_seconds(failures)}; save every "
        f"{format_seconds(interval)}; {kept:.1%} of the time ends up in kept steps"
    )
    for name, factor in waiting.items():
        typer.echo(f"  {name}: {factor:.3f} x the undisturbed step")
