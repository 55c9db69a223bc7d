"""A slice of `make fuzz-models`: families of each kind, in every layout that is legal."""

from __future__ import annotations

import importlib
from typing import Any

import pytest


@pytest.fixture(scope="module")
def script() -> Any:
    return importlib.import_module("fuzz_models")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_layouts_and_micro_batches_equal_one_worker(script: Any) -> None:
    """Attention by interface and of its own, experts, positions after padding, tags, two halves."""
    wanted = {
        *("qwen2, causal-lm, packed", "falcon, causal-lm, padded", "gemma2, causal-lm, padded"),
        *("mixtral, causal-lm, packed", "xlm-roberta, token-classification, padded"),
        *("t5, sequence-to-sequence, padded", "vit, image-classification, padded"),
    }
    names = ["qwen2", "falcon", "gemma2", "mixtral", "xlm-roberta", "t5", "vit"]
    chosen = [each for each in script.families(names) if str(each) in wanted]
    assert len(chosen) == len(wanted)
    rows = script.compared(chosen)
    assert len(rows) == 2 * 7 + 2 * 7 + 3  # tensor for three of them
    assert {case: reason for case, reason in rows if reason} == {}


def test_a_curve_that_differs_is_told(script: Any) -> None:
    one = {"losses": [5.0, 4.0], "norms": [1.0, 1.0]}
    assert script.wrong(one, one) is None
    said = script.wrong({**one, "losses": [5.0, 4.001]}, one)
    assert said is not None and said.startswith("loss 2.5e-04")
    assert script.wrong({"error": "RuntimeError: no"}, one) == "RuntimeError: no"
    assert script.wrong({**one, "losses": [5.0, None]}, one) == "loss inf, norm 0.0e+00"
    held = {"first_loss": 5.0, "reference": 5.000001}
    assert script.astray(held) is None
    assert script.astray({**held, "reference": 5.00002}) == "transformers: 4.0e-06"
