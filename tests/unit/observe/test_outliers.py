"""Numbers that stand out are named; those that do not are left alone."""

from __future__ import annotations

import math

from shoal.observe.outliers import Outliers


def settled() -> Outliers:
    """After sixty ordinary steps of two ranks."""
    found = Outliers()
    for step in range(60):
        wobble = 0.02 * math.sin(step)
        assert not list(found.look(loss=3.0 + wobble, norms=[1.0 + wobble, 1.1 - wobble]))
    return found


def test_an_ordinary_run_says_nothing() -> None:
    assert not list(settled().look(loss=3.0, norms=[1.0, 1.1]))


def test_a_loss_far_above_the_recent_ones() -> None:
    found = settled()
    ((name, fields),) = found.look(loss=9.0, norms=[1.0, 1.1])
    assert name == "loss-spike" and fields["loss"] == 9.0
    assert not list(settled().look(loss=3.2, norms=[1.0, 1.1]))


def test_a_rank_whose_gradients_dwarf_the_others() -> None:
    ((name, fields),) = settled().look(loss=3.0, norms=[1.0, 500.0])
    assert name == "gradient-outlier" and fields["rank"] == 1
    assert not list(settled().look(loss=3.0, norms=[400.0, 500.0])), "all large: no one's fault"


def test_which_ranks_are_not_finite() -> None:
    assert Outliers.not_finite([1.0, math.nan, math.inf, 2.0]) == [1, 2]
    assert Outliers.not_finite([]) == []
