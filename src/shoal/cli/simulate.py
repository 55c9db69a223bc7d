"""`shoal simulate`: the timeline of a step and the goodput of a long run on a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.plan_arguments import (
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

if TYPE_CHECKING:
    from shoal.plan.cost.step import Prediction
    from shoal.plan.goodput import Jitter, Reliability
    from shoal.plan.simulate import Timeline


def simulate(
    cluster: Annotated[str, typer.Option("--cluster", help="Such as '16x8xH100, 400Gbit'.")],
    recipe: RecipeName = None,
    overrides: Overrides = None,
    devices: Devices = None,
    model: Model = None,
    sequence: Sequence = None,
    batch: Batch = None,
    precision: Precision = None,
    fix: Fix = None,
    out: Annotated[
        Path | None, typer.Option("--trace", help="Write a Perfetto trace here.")
    ] = None,
    image: Picture = None,
    failure_hours: Annotated[
        float, typer.Option(help="Mean hours between failures of one device.")
    ] = 50_000.0,
    save_seconds: Annotated[float, typer.Option(help="How long a save stops the run.")] = 30.0,
    restart_seconds: Annotated[float, typer.Option(help="From a failure to a new step.")] = 300.0,
    slow_share: Annotated[float, typer.Option(help="Share of replicas that are slow.")] = 0.0,
    slow_factor: Annotated[float, typer.Option(help="How much slower they are.")] = 1.5,
    as_json: AsJson = False,
) -> None:
    """Play out the best plan on a cluster, or that of --fix, and what a long run keeps."""
    from shoal.plan import goodput, picture
    from shoal.plan import simulate as simulator

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
    best = given.found().best
    timeline = simulator.simulate_step(given.estimator, candidate=best.candidate)
    if out is not None:
        out.write_text(simulator.trace(timeline))
    if image is not None:
        picture.step(timeline).savefig(image)
    trust = goodput.Reliability(
        device_failure_seconds=failure_hours * 3600,
        save_seconds=save_seconds,
        restart_seconds=restart_seconds,
    )
    jitter = goodput.Jitter(slow_share=slow_share, slow_factor=slow_factor)
    report = _report(best, timeline=timeline, trust=trust, jitter=jitter)
    if as_json:
        more = {"not_yet": given.lacking, "command": given.command(best) or None}
        say(json.dumps({**report, **more}, indent=1), verbatim=True)
    else:
        say(_text(report, best=best, missing=given.lacking, today=given.today(best)))


_POLICIES: dict[str, dict[str, Any]] = {
    "every-step": {},
    "diloco": {"every_steps": 100},
}
"""Policies whose waiting is shown, with their settings."""


def _report(
    best: Prediction, *, timeline: Timeline, trust: Reliability, jitter: Jitter
) -> dict[str, Any]:
    """The step as played, the best interval between saves, and how policies bear stragglers."""
    from shoal.plan import goodput
    from shoal.plan.explain import to_json

    workers = best.workers
    copies = best.candidate.layout.replicate * best.candidate.layout.shard
    interval = goodput.best_interval_seconds(trust, workers=workers)
    return {
        "plan": to_json(best),
        "simulated_step_seconds": timeline.seconds,
        "bubble": timeline.bubble,
        "failure_seconds": goodput.failure_seconds(trust, workers=workers),
        "checkpoint_seconds": interval,
        "goodput": goodput.expected_goodput(trust, workers=workers, interval_seconds=interval),
        "waiting_factor": {
            name: goodput.waiting_factor(jitter, replicas=copies, policy=name, **settings)
            for name, settings in _POLICIES.items()
        },
    }


def _text(report: dict[str, Any], *, best: Prediction, missing: list[str], today: list[str]) -> str:
    from shoal.legal import Combination, not_yet
    from shoal.plan.explain import ERROR, choices
    from shoal.units import format_seconds

    lines = [
        *[f"Not in shoal yet: {line}" for line in missing],
        f"{'It would be' if missing else 'Plan'}: {choices(best.candidate)}",
        *today,
        f"Step: {report['simulated_step_seconds']:.4g} s played out, {best.step_seconds:.4g} s "
        f"by formula, both predicted ({ERROR}); {report['bubble']:.1%} of the passes are bubbles",
        f"Long run: a failure every {format_seconds(report['failure_seconds'])}; save every "
        f"{format_seconds(report['checkpoint_seconds'])}; {report['goodput']:.1%} of the time "
        "ends up in kept steps",
    ]
    later = []
    for name, factor in report["waiting_factor"].items():
        how = ", ".join(f"{key.replace('_', ' ')} {n}" for key, n in _POLICIES[name].items())
        text = f"{name}{f' ({how})' if how else ''}: {factor:.3f} x the undisturbed step"
        if not not_yet(Combination(policy=name)):
            lines.append(f"  {text}")
        else:
            later.append(text)
    return "\n".join(
        [*lines, *([f"Not in shoal yet, would be: {'; '.join(later)}"] if later else [])]
    )
