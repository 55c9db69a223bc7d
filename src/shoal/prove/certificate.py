"""The certificate of a layout: what was compared, how far apart it may be and is, the verdict."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from shoal.prove.recording import Figures

MARGIN = 16.0
"""How much further apart a layout may be than one worker is from itself when its sums are ordered
otherwise: 8 workers order 8 times as many sums anew, in the forward and in the backward."""
LEAST = 1e-6
"""Tolerances are no smaller: a few units in the last place of float32 (6e-8), over a few sums."""
PROMISE = 1e-5
"""Of the loss, in float32."""

OPENED = 1e-5
"""Of the loss that transformers gives for the exported folder; measured: below 1e-6."""


@dataclass
class Tolerance:
    """How far apart a right layout can be, by what reordered sums and float64 do to one worker."""

    loss: float
    norm: float
    gradients: dict[str, float]
    parameters: dict[str, float]
    reordered: float
    """Largest distance of a gradient when one worker adds other micro batches."""
    rounding: float | None
    """Largest distance of a gradient to a run in float64; None where there was none."""

    def describe(self) -> str:
        """How it was derived, in words."""
        beside = f"one worker with other micro batches differs from itself by {self.reordered:.1e}"
        if self.rounding is not None:
            beside += f", and from float64 by {self.rounding:.1e}"
        return (
            f"{beside} (largest over gradients); allowed is {MARGIN:g} times that of each "
            f"gradient, at least {LEAST:g}; of the loss {self.loss:.1e}"
        )


def tolerance_from(reordered: Figures, double: Figures | None, *, promise: bool) -> Tolerance:
    """What one worker's own differences allow. `promise`: float32, whose losses are promised."""
    known = [reordered, *([double] if double is not None else [])]
    loss = max(LEAST, MARGIN * max(max(each.losses) for each in known))
    gradients: dict[str, float] = {}
    for name in reordered.gradients[0]:
        worst = max(step[name] for each in known for step in each.gradients)
        gradients[name] = worst
    usual = statistics.median(gradients.values())
    parameters = {n: max(each.parameters[n] for each in known) for n in reordered.parameters}
    typical = statistics.median(parameters.values())
    return Tolerance(
        loss=min(loss, PROMISE) if promise else loss,
        norm=max(LEAST, MARGIN * max(max(each.norms) for each in known)),
        gradients={n: max(LEAST, MARGIN * max(v, usual)) for n, v in gradients.items()},
        parameters={n: max(LEAST, MARGIN * max(v, typical)) for n, v in parameters.items()},
        reordered=max(max(step.values()) for step in reordered.gradients),
        rounding=None if double is None else max(max(step.values()) for step in double.gradients),
    )


@dataclass
class Failure:
    """One thing that is further apart than it may be."""

    what: str
    """loss, norm, gradient, parameter, start, round trip."""
    where: str
    step: int | None
    found: float
    allowed: float

    def __str__(self) -> str:
        at = "" if self.step is None else f" at step {self.step + 1}"
        return f"{self.what} {self.where}{at}: {self.found:.2e}, allowed {self.allowed:.1e}"


@dataclass
class Certificate:
    """The verdict on one layout."""

    layout: str
    model: str
    steps: int
    compute: str
    tolerance: Tolerance
    proven: bool = False
    largest: dict[str, tuple[float, str]] = field(default_factory=dict)
    """loss, norm, gradient, parameter, round trip -> (largest distance, where)."""
    failures: list[Failure] = field(default_factory=list)
    cause: str | None = None
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "derived": self.tolerance.describe()}

    def __str__(self) -> str:
        verdict = "equals one worker" if self.proven else "DOES NOT EQUAL one worker"
        lines = [
            f"{self.layout}: {verdict}",
            f"  model      {self.model}",
            f"  run        {self.steps} steps, {self.compute}, same seed and data",
            f"  tolerance  {self.tolerance.describe()}",
        ]
        for what, (value, where) in self.largest.items():
            lines.append(f"  {what:<10} {value:.1e}{f' at {where}' if where else ''}")
        if self.failures:
            shown = self.failures[:12]
            more = len(self.failures) - len(shown)
            lines += ["  failed, in the order of the backward:", *(f"    {each}" for each in shown)]
            lines += [f"    and {more} more"] if more else []
        if self.cause is not None:
            lines.append(f"  likely cause: {self.cause}")
        lines.append(f"  {self.seconds:.0f} s")
        return "\n".join(lines)


def judge(figures: Figures, tolerance: Tolerance) -> tuple[list[Failure], dict[str, Any]]:
    """What failed, nearest to the loss first, and the largest distances with their places."""
    failures: list[Failure] = []
    if not figures.begins_equal:
        failures.append(Failure("start", "the initial weights are other bits", None, 1.0, 0.0))
    for step, value in enumerate(figures.losses):
        if not value <= tolerance.loss:
            failures.append(Failure("loss", "", step, value, tolerance.loss))
    for step, named in enumerate(figures.gradients):
        for name in reversed(named):  # the model's order, so the head comes first
            if not named[name] <= tolerance.gradients[name]:
                allowed = tolerance.gradients[name]
                failures.append(Failure("gradient", name, step, named[name], allowed))
    for step, value in enumerate(figures.norms):
        if not value <= tolerance.norm:
            failures.append(Failure("norm", "", step, value, tolerance.norm))
    for name, value in figures.parameters.items():
        if not value <= tolerance.parameters[name]:
            failures.append(Failure("parameter", name, None, value, tolerance.parameters[name]))
    gradients = [(v, n, s) for s, named in enumerate(figures.gradients) for n, v in named.items()]
    worst, name, step = max(gradients)
    parameter = max(figures.parameters.items(), key=lambda pair: pair[1])
    largest = {
        "loss": (max(figures.losses), f"step {figures.losses.index(max(figures.losses)) + 1}"),
        "gradient": (worst, f"{name}, step {step + 1}"),
        "norm": (max(figures.norms), f"step {figures.norms.index(max(figures.norms)) + 1}"),
        "parameter": (parameter[1], parameter[0]),
    }
    return failures, largest
