"""The out-of-memory doctor: what is refused, which fixes come first, what is said afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shoal.config.load import load_recipe
from shoal.engine.decision import Decision
from shoal.environment import free_memory_bytes
from shoal.errors import ConfigError
from shoal.launch.memory import fixes, needed_bytes, refuse_what_cannot_fit
from shoal.layout import Layout
from shoal.prove.rehearse import Fault, rehearse
from tiny import Bench

GIB = 2**30
TWO = Decision(
    Layout(replicate=2), "processes", 1, 8, "float32", "", predicted={"peak_memory_bytes": 3 * GIB}
)


def test_processes_hold_everything_each_and_threads_share() -> None:
    assert needed_bytes(TWO) == 6 * GIB
    shared = {"peak_memory_bytes": 3.0 * GIB, "state_bytes": 8.0 / 3.0 * GIB}
    assert needed_bytes(replace(TWO, workers="threads", predicted=shared)) == pytest.approx(4 * GIB)
    assert needed_bytes(replace(TWO, predicted={})) is None


def test_what_cannot_fit_is_refused_with_the_cheapest_fix_first() -> None:
    recipe = load_recipe("quickstart")
    refuse_what_cannot_fit(recipe, TWO, free_bytes=7 * GIB)
    refuse_what_cannot_fit(recipe, TWO, free_bytes=None)
    with pytest.raises(ConfigError) as refused:
        refuse_what_cannot_fit(recipe, TWO, free_bytes=6 * GIB)
    text = str(refused.value)
    assert "needs about 6" in text and "2 processes, micro batch 8" in text
    order = [
        "micro_batch_samples=4",
        "recompute=full",
        "workers=threads",
        "shard=2",
        "replicate=1 (fewer",
        "sequence_tokens=128",
    ]
    places = [text.index(word) for word in order]
    assert places == sorted(places)


def test_no_fix_that_is_none() -> None:
    recipe = load_recipe("quickstart")
    lone = replace(TWO, layout=Layout(), micro_batch_samples=1, compute="bfloat16")
    assert [fix.partition("=")[0] for fix in fixes(recipe, lone)] == [
        "parallel.recompute",
        "data.sequence_tokens",
        "a smaller model",
    ]


def test_free_memory_is_known_here() -> None:
    free = free_memory_bytes()
    assert free is None or 2**20 < free < 2**45


def test_a_real_one_is_explained(bench: Bench) -> None:
    """Twice at the same step: given up, with what was measured and what needs less."""
    out = bench.new_path()
    out.mkdir()
    words = ("train.steps=8", "train.evaluate_every_steps=0", "parallel.replicate=2")
    clean = bench.run(*words)
    faults = [Fault.parse("out-of-memory:1@6"), Fault.parse("out-of-memory:1@6")]
    found = rehearse(bench.recipe, words, faults=faults, out=out, pool=bench.pool, clean=clean.path)
    assert "at step 6, 2 times" in found.message
    assert "peak of live tensors in one worker" in found.message
    assert "needs less: train.micro_batch_samples=" in found.message
    assert Path(found.run / "metrics.jsonl").is_file()
