"""Parameter servers by the product's own loop: what each consistency must equal and keep."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from tiny import Bench, Run

TWO = ("parallel.replicate=2", "launch.workers=processes")
SYNCHRONOUS = "sync={kind: server, consistency: {kind: bounded, staleness: 0}%s}"
SGD = (
    "train.optimizer={kind: sgd, learning_rate: 0.05}",
    "train.max_gradient_norm=null",
    "train.steps=20",
)
ADAMW = ("train.max_gradient_norm=null", "train.steps=20")


def largest_difference(found: Run, wanted: Run) -> float:
    """Over all exported weights, relative to the largest of each tensor."""
    ours, theirs = (load_file(run.path / "model" / "model.safetensors") for run in (found, wanted))
    assert ours.keys() == theirs.keys()
    pairs = [(ours[name], theirs[name]) for name in theirs]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize(
    ("optimizer", "more", "tolerance"),
    [
        (SGD, "", 1e-6),
        (SGD, ", servers: 2", 1e-6),
        (SGD, ", push: deltas, optimizer: {kind: sgd}", 1e-6),
        (ADAMW, "", 1e-5),
    ],
)
def test_without_staleness_it_is_every_step(
    bench: Bench, optimizer: tuple[str, ...], more: str, tolerance: float
) -> None:
    """The server's mean over targets is the gradient of the global batch; AdamW divides by the
    root of squares near zero at first, which makes more of the order of a sum."""
    wanted = bench.run(*TWO, *optimizer)
    found = bench.run(*TWO, *optimizer, SYNCHRONOUS % more)
    assert largest_difference(found, wanted) < tolerance
    theirs = {row["step"]: row["evaluation_loss"] for row in wanted.evaluations}
    for row in found.evaluations:
        assert row["evaluation_loss"] == pytest.approx(theirs[row["step"]], rel=1e-5)
