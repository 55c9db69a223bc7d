"""The likely cause of a layout's wrong gradients, from the pattern that they make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.layout import AXES, Layout
from shoal.prove.certificate import Tolerance
from shoal.prove.recording import Figures, Recording

_CLEAR = 1e-2
"""Distance after the best scaling below which a gradient counts as the right one, scaled."""


@dataclass(frozen=True)
class _Fit:
    """`found` is about `scale` times `wanted`; `left`: what that does not explain."""

    scale: float
    left: float


def cause_of(
    found: Recording,
    wanted: Recording,
    figures: Figures,
    tolerance: Tolerance,
    *,
    layout: Layout,
) -> str:
    """One sentence. Meant for a run whose figures failed."""
    if not figures.begins_equal:
        return _at_the_start(found, wanted)
    facts = found.facts(0)
    bad = [n for n, v in figures.gradients[0].items() if not v <= tolerance.gradients[n]]
    size, digests = int(facts["replica_workers"]), facts["gradient_digests"]
    if any(len(set(digests[position::size])) > 1 for position in range(size)):
        return "missing reduction: after it, replicas still hold different gradients"
    if not bad:
        if figures.losses and not figures.losses[0] <= tolerance.loss:
            return "the loss is put together wrongly; gradients of the first step are right"
        return "the update differs: gradients of the first step are right, what follows is not"
    if lost := _lost_experts(found, wanted, bad):
        return f"lost expert gradient: {', '.join(lost[:3])} had tokens, and no gradient came of it"
    fits = {name: _fit(*_read(found, wanted, name)) for name in bad}
    scaled = {name: fit for name, fit in fits.items() if fit.left < _CLEAR}
    everywhere = len(bad) > 0.9 * len(figures.gradients[0])
    ties = [set(names) for names in facts["ties"]]
    partial = set(facts["partial"])
    tied = {name for names in ties for name in names}
    if set(bad) <= tied and layout.pipeline > 1 and set(bad) <= set(scaled):
        return _tied_between_stages({bad[0]: scaled[bad[0]].scale})
    if set(bad) <= tied:
        return f"lost tie: only {', '.join(sorted(bad))} is off, whose gradient has two parts"
    if scaled and len(scaled) > 0.9 * len(bad):
        return _scaled(scaled, bad=bad, partial=partial, everywhere=everywhere, layout=layout)
    if set(bad) <= partial and figures.losses[0] <= tolerance.loss:
        inside = " and ".join(axis for axis in ("context", "tensor") if layout.degree(axis) > 1)
        return (
            f"missing reduction over {inside}: gradients that each rank has a part of were not "
            f"summed ({', '.join(sorted(bad)[:4])})"
        )
    if layout.context > 1 and not figures.losses[0] <= tolerance.loss:
        return (
            "wrong mask, or tokens out of order, over context: the first loss is off already, so "
            "that some tokens see others than they should, or have another's label or position"
        )
    if everywhere and figures.losses[0] <= tolerance.loss:
        return (
            "wrong weights in the sum: losses agree, gradients do not, and no factor explains it; "
            "a mean of means (each part divided by its own number of targets) does this"
        )
    first = next(iter(reversed(bad)))
    of_stages = (
        "; a stage may read by the index of a layer what is another's, such as its type"
        if layout.pipeline > 1
        else ""
    )
    return (
        f"the forward or backward of {first} or of what follows it is wrong: it is the failing "
        f"one nearest to the loss{of_stages}"
    )


def _tied_between_stages(scales: dict[str, float]) -> str:
    """The first and the last stage each have a part of this gradient: right but for a factor."""
    ((name, scale),) = scales.items()
    return (
        f"double reduction over pipeline: {name}, which the first and the last stage share, has "
        f"{scale:.4g} times its gradient"
    )


def _lost_experts(found: Recording, wanted: Recording, bad: list[str]) -> list[str]:
    """Where nothing is off but experts [experts, outputs, inputs]: those without any gradient."""
    lost = []
    for name in bad:
        ours, theirs = (each.step(0).read(name, kind="gradient") for each in (found, wanted))
        if ours.dim() != 3:
            return []
        gone = (ours.flatten(1).norm(dim=1) == 0) & (theirs.flatten(1).norm(dim=1) > 0)
        lost += [f"expert {int(number)} of {name}" for number in gone.nonzero()]
    return lost


def _scaled(
    scaled: dict[str, _Fit],
    *,
    bad: list[str],
    partial: set[str],
    everywhere: bool,
    layout: Layout,
) -> str:
    """Gradients are right but for a factor."""
    scales = sorted(fit.scale for fit in scaled.values())
    middle = scales[len(scales) // 2]
    whose = "all gradients" if everywhere else f"{len(bad)} gradients ({', '.join(bad[:3])})"
    for axis, degree in _degrees(layout):
        if abs(middle / degree - 1) < _CLEAR:
            return f"double reduction over {axis}: {whose} are {degree} times too large"
        if abs(middle * degree - 1) < _CLEAR:
            if set(bad) <= partial and axis == "tensor":
                return f"missing reduction over tensor: {whose} are a {degree}th of the sum"
            return (
                f"scale off by a mesh degree: {whose} are divided by {degree}, the degree of "
                f"{axis} (a mean where the sum belongs)"
            )
    return f"scale off: {whose} are {middle:.4g} times what they should be"


def _degrees(layout: Layout) -> Iterator[tuple[str, int]]:
    for axis in AXES:
        if layout.degree(axis) > 1:
            yield axis, layout.degree(axis)
    if layout.replicate > 1 and layout.shard > 1:
        yield "replicate x shard", layout.replicate * layout.shard
    if layout.workers > 1:
        yield "all axes", layout.workers


def _at_the_start(found: Recording, wanted: Recording) -> str:
    """The initial weights differ: in which way."""
    ours, theirs = found.step(0), wanted.step(0)
    for name in theirs.names():
        a, b = ours.read(name), theirs.read(name)
        if torch.equal(a.double(), b.double()):
            continue
        if _repeats(a) and not _repeats(b):
            return (
                f"identical shards at the start: {name} repeats the same values in each rank's "
                "part (every rank drew them from the same numbers)"
            )
        if torch.equal(a.flatten().double().sort().values, b.flatten().double().sort().values):
            return f"wrong order: {name} begins with the right values in other places"
        if other := next((n for n in theirs.names() if torch.equal(theirs.read(n), a)), None):
            return f"wrong stage: {name} begins with the values of {other}"
        return f"wrong shard: {name} does not begin with the values of one worker"
    return "the initial weights differ"


def _repeats(tensor: Tensor) -> bool:
    """Whether halves along a dim are equal, and not constant."""
    for dim in range(tensor.dim()):
        size = tensor.shape[dim]
        if size % 2 == 0 and float(tensor.double().std() if tensor.numel() > 1 else 0.0) > 0:
            low, high = tensor.chunk(2, dim=dim)
            if torch.equal(low, high):
                return True
    return False


def _read(found: Recording, wanted: Recording, name: str) -> tuple[Tensor, Tensor]:
    return (
        found.step(0).read(name, kind="gradient").double().flatten(),
        wanted.step(0).read(name, kind="gradient").double().flatten(),
    )


def _fit(found: Tensor, wanted: Tensor) -> _Fit:
    square = float(wanted.dot(wanted))
    if square == 0.0:
        return _Fit(1.0, float("inf") if float(found.norm()) else 0.0)
    scale = float(found.dot(wanted)) / square
    left = float((found - scale * wanted).norm()) / max(float(found.norm()), 1e-300)
    return _Fit(scale, left)
