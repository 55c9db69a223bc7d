"""What is decided for several hosts by made-up links: the choice, what it says, why not."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.config.load import load_recipe
from shoal.engine.decision import Decision
from shoal.engine.job import Job
from shoal.launch import calls
from shoal.launch.hosts_plan import choose_over_hosts
from shoal.launch.links import Links, Measured, worker_rate
from shoal.launch.prepare import prepare_inputs
from shoal.observe.console import Console
from shoal.plan.over_hosts import Link
from tiny import Bench

INSIDE = Link(1e9, 20e-6)
SLOW = Links(INSIDE, Link(1e5, 1e-3), ring=(Measured(1e5, 2e-3),) * 2)
FAST = Links(INSIDE, Link(1e9, 20e-6), ring=(Measured(1e9, 4e-5),) * 2)
OPEN = ("parallel=auto", "launch.workers=processes")


def host(name: str, *, cores: int = 4, memory_bytes: int = 1 << 34) -> calls.Here:
    known = {"shoal": "1", "torch": "1", "code": "1"}
    return calls.Here(name=name, cores=cores, memory_bytes=memory_bytes, **known)


def chosen(
    bench: Bench, *words: str, links: Links | None = SLOW, here: tuple[calls.Here, ...] = ()
) -> tuple[Decision, str]:
    """The decision for two hosts, and what a person is told meanwhile."""
    recipe = load_recipe(str(bench.recipe), words)
    out = io.StringIO()
    known: dict[str, Any] = {"pool": bench.pool, "console": Console(out=out)}
    known["inputs"] = prepare_inputs(recipe, say=lambda text: None)
    there = here or (host("h1"), host("h2"))
    decision = choose_over_hosts(recipe, here=there, count=2, links=links, **known)
    return decision, out.getvalue()


def test_auto_takes_stages_across_a_slow_link_and_keeps_the_figures(bench: Bench) -> None:
    here = (host("h1", cores=2), host("h2", cores=2))
    decision, said = chosen(bench, *OPEN, here=here)
    assert decision.layout.pipeline > 1 and decision.layout.replicate == 1
    assert decision.layout.workers == 4, "one thread each, as the recipe says: all cores"
    assert "s a step over 2 hosts" in decision.reason and "next best" in decision.reason
    assert decision.measured["links"]["between"] == {"bytes_per_second": 1e5, "seconds": 1e-3}
    assert decision.measured["links"]["ring"][1]["round_trip_seconds"] == 2e-3
    assert decision.predicted["step_seconds"] > 0 and "peak_memory_bytes" in decision.predicted
    assert "warning" not in said


def test_what_the_recipe_gives_is_kept(bench: Bench) -> None:
    decision, _ = chosen(bench, *OPEN, "parallel.replicate=2", "parallel.tensor=2")
    assert (decision.layout.replicate, decision.layout.tensor) == (2, 2)
    decision, _ = chosen(bench, *OPEN, "launch.threads_per_worker=4", links=FAST)
    assert decision.layout.workers == 2 and decision.threads_per_worker == 4
    decision, _ = chosen(bench, "parallel={replicate: 2}")
    assert decision.layout.workers == 2 and "predicted" not in decision.reason


def test_hosts_that_differ_are_reckoned_as_the_smallest(bench: Bench) -> None:
    here = (host("h1", cores=4), host("h2", cores=2))
    decision, _ = chosen(bench, *OPEN, here=here)
    assert decision.layout.workers == 4
    assert "reckoned with the 2 cores of h2, the fewest" in decision.reason


@pytest.mark.parametrize(
    ("words", "links", "why"),
    [
        (OPEN, None, "the links between hosts could not be measured"),
        ((*OPEN, "parallel.tensor=2", "launch.threads_per_worker=3"), SLOW, "no other layout"),
    ],
)
def test_what_a_plan_cannot_judge_it_says(
    bench: Bench, words: tuple[str, ...], links: Links | None, why: str
) -> None:
    decision, _ = chosen(bench, *words, links=links)
    assert decision.layout.replicate == 2
    assert decision.reason.startswith(f"a replica for each host: {why}")


def test_tensor_between_hosts_is_told_its_price(bench: Bench) -> None:
    words = ("parallel={replicate: 1, tensor: 2}", "train.micro_batch_samples=4")
    _, said = chosen(bench, *words)
    assert "warning: tensor 2 lies between hosts and talks in every block: about" in said
    # 10 calls, 2 blocks, 4 micro batches, half of 4 x 32 x 32 floats each; 80 messages of 1 ms
    wanted = 10 * 2 * 4 * 0.5 * 4 * 32 * 32 * 4 / 1e5 + 80 * 1e-3
    assert f"about {wanted:.2g} s of a step" in said
    _, said = chosen(bench, "parallel={replicate: 2, tensor: 2}")
    assert "warning: tensor" not in said


def test_a_worker_has_its_part_of_a_cable(bench: Bench) -> None:
    decision, _ = chosen(bench, "parallel={replicate: 4}")
    recipe = load_recipe(str(bench.recipe))
    inputs = prepare_inputs(recipe, say=lambda text: None)
    job = Job(recipe=recipe, run=Path("run"), inputs=inputs, decision=decision)
    assert worker_rate(job, num_hosts=2) == 1e5 / 2
    assert worker_rate(job, num_hosts=1) is None
    unknown = replace(job, decision=replace(decision, measured={}))
    assert worker_rate(unknown, num_hosts=2) is None
    played = load_recipe(str(bench.recipe), ["launch.link=8Mbit/s"])
    assert worker_rate(replace(unknown, recipe=played), num_hosts=1) == 1e6
