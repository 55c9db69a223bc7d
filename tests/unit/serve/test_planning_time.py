"""What a step costs before it computes: processor time of its plan, which others hardly disturb."""

from __future__ import annotations

import statistics
import time

import pytest

from shoal.serve.blocks import Blocks
from shoal.serve.scheduler import Limits, View, plan_step

LIMITS = Limits(step_tokens=128, block_tokens=64, num_blocks=4096, max_running=64)
MARK = 1e-3


def seconds(running: list[View], waiting: list[View]) -> float:
    spent = []
    for _ in range(100):
        began = time.process_time()
        plan = plan_step(running, waiting, free=3000, limits=LIMITS)
        spent.append(time.process_time() - began)
    assert plan.chunks, "there was something to plan"
    return statistics.median(spent)


@pytest.mark.timed
def test_sixteen_sequences_are_planned_within_a_millisecond() -> None:
    making = [View(key, 200 + key, computed=199 + key, blocks=4, own=4) for key in range(16)]
    begun = [View(key, 900, computed=64, blocks=15, own=15) for key in range(16)]
    coming = [View(100 + key, 300, computed=64, blocks=1, own=1) for key in range(16)]
    for running, waiting in ((making, []), (begun, []), ([], coming), (making, coming)):
        assert seconds(running, waiting) < MARK


@pytest.mark.timed
def test_beginnings_of_sixteen_prompts_are_found_within_a_millisecond() -> None:
    blocks = Blocks(num_blocks=4096, block_tokens=64)
    prompts = [list(range(key, key + 2000)) for key in range(16)]
    spent = []
    for _ in range(50):
        began = time.process_time()
        for prompt in prompts:
            blocks.match(prompt, root=None)
        spent.append(time.process_time() - began)
    assert statistics.median(spent) < MARK
