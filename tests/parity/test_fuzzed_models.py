"""A slice of `make fuzz-models`: families of each kind, in every layout that is legal."""

from __future__ import annotations

import importlib
from typing import Any

import pytest


@pytest.fixture(scope="module")
def script() -> Any:
    return importlib.import_module("fuzz_models")


@pytest.mark.timeout(300)
def test_layouts_and_micro_batches_equal_one_worker(script: Any) -> None:
    """Attention by interface and of its own, experts, positions after padding, tags."""
    chosen = script.families(["qwen2", "falcon", "mixtral", "xlm-roberta"])
    assert {str(each) for each in chosen} >= {
        *("qwen2, causal-lm, packed", "falcon, causal-lm, padded"),
        *("mixtral, causal-lm, packed", "xlm-roberta, token-classification, padded"),
    }
    wanted = [each for each in chosen if each.packing or each.name not in ("qwen2", "mixtral")]
    rows = script.compared(wanted)
    assert len(rows) >= 9
    assert {case: reason for case, reason in rows if reason} == {}


def test_a_curve_that_differs_is_told(script: Any) -> None:
    one = {"losses": [5.0, 4.0], "norms": [1.0, 1.0]}
    assert script.wrong(one, one) is None
    said = script.wrong({**one, "losses": [5.0, 4.001]}, one)
    assert said is not None and said.startswith("loss 2.5e-04")
    assert script.wrong({"error": "RuntimeError: no"}, one) == "RuntimeError: no"
