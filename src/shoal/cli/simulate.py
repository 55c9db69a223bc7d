"""`shoal simulate`: the timeline of a step and the goodput of a long run on a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.asked import Asked, DefaultCommand, asking

if TYPE_CHECKING:
    from shoal.plan.cost.step import Prediction
    from shoal.plan.goodput import Jitter, Reliability
    from shoal.plan.simulate import Timeline

app = typer.Typer(
    cls=DefaultCommand,
    help="Simulate a step and a long run: `shoal simulate RECIPE --cluster 16x8xH100`.",
    no_args_is_help=True,
)


@app.command("for")
@asking
def simulate(
    asked: Asked,
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

    found, estimator = asked.found()
    best = found.best
    timeline = simulator.simulate_step(estimator, candidate=best.candidate)
    if out is not None:
        out.write_text(simulator.trace(timeline))
    if image is not None:
        image.write_text(simulator.picture(timeline))
    trust = goodput.Reliability(
        device_failure_seconds=failure_hours * 3600,
        save_seconds=save_seconds,
        restart_seconds=restart_seconds,
    )
    jitter = goodput.Jitter(slow_share=slow_share, slow_factor=slow_factor)
    report = _report(best, timeline=timeline, trust=trust, jitter=jitter)
    typer.echo(json.dumps(report, indent=1) if as_json else _text(report, best=best))


def _report(
    best: Prediction, *, timeline: Timeline, trust: Reliability, jitter: Jitter
) -> dict[str, Any]:
    """The step as played, the best interval between saves, and how policies bear stragglers."""
    from shoal.plan import goodput
    from shoal.plan.explain import to_json

    workers = best.workers
    copies = best.candidate.layout.replicate * best.candidate.layout.shard
    interval = goodput.best_interval_seconds(trust, workers=workers)
    waiting = {
        "every-step": goodput.waiting_factor(jitter, replicas=copies),
        "diloco every 100 steps": goodput.waiting_factor(
            jitter, replicas=copies, policy="diloco", every_steps=100
        ),
        "server, 4 steps of staleness": goodput.waiting_factor(
            jitter, replicas=copies, policy="server", staleness=4
        ),
    }
    return {
        "plan": to_json(best),
        "simulated_step_seconds": timeline.seconds,
        "bubble": timeline.bubble,
        "failure_seconds": goodput.failure_seconds(trust, workers=workers),
        "checkpoint_seconds": interval,
        "goodput": goodput.expected_goodput(trust, workers=workers, interval_seconds=interval),
        "waiting_factor": waiting,
    }


def _text(report: dict[str, Any], *, best: Prediction) -> str:
    from shoal.plan.explain import choices
    from shoal.units import format_seconds

    lines = [
        f"Plan: {choices(best.candidate)}",
        f"Step: {report['simulated_step_seconds']:.4g} s simulated, {best.step_seconds:.4g} s "
        f"predicted, {report['bubble']:.1%} of the passes are bubbles",
        f"Long run: a failure every {format_seconds(report['failure_seconds'])}; save every "
        f"{format_seconds(report['checkpoint_seconds'])}; {report['goodput']:.1%} of the time "
        "ends up in kept steps",
    ]
    lines += [
        f"  {name}: {factor:.3f} x the undisturbed step"
        for name, factor in report["waiting_factor"].items()
    ]
    return "\n".join(lines)
