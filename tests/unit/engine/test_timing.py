"""Timing while all workers of a group do the same."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from shoal.comm.group import Group
from shoal.engine.timing import Clock, Threads, alone


def test_the_same_answer_on_every_rank_and_threads_that_stay() -> None:
    """Three calls of 20 ms and one of 40: the mean of the ranks is 30 (a busy machine adds)."""
    crowd = Threads(2, threads_each=1)

    def body(group: Group) -> tuple[float, int, int]:
        seconds = Clock(group).seconds(lambda: time.sleep(0.02 * (1 + group.rank)))
        return seconds, threading.get_ident(), torch.get_num_threads()

    first, second = crowd.run(body)
    assert first[0] == second[0]
    assert 0.03 <= first[0] < 0.2
    assert (first[2], second[2]) == (1, 1)
    again = crowd.run(body)
    assert {each[1] for each in again} == {first[1], second[1]}


def test_short_calls_are_repeated_until_a_clock_can_tell() -> None:
    calls: list[int] = []
    seconds = Clock(alone()).seconds(lambda: calls.append(1))
    assert len(calls) > 1000
    assert seconds < 1e-4


def test_a_failure_in_one_thread_is_raised_and_frees_the_others() -> None:
    def body(group: Group) -> None:
        if group.rank == 1:
            raise ValueError("rank 1 is broken")
        group.barrier()

    with pytest.raises(ValueError, match="rank 1 is broken"):
        Threads(3, threads_each=1).run(body)
