"""Threads that share the work of compression, whose results do not depend on how many there are.

Each computes with one core, whatever their number, so every product has the bits that it has alone;
results are taken in the order of what was given, not of who is ready first.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

Given = TypeVar("Given")
Found = TypeVar("Found")


class Workers:
    """A context: while it is open, torch computes with one core a thread."""

    def __init__(self, count: int | None = None) -> None:
        """`count`: threads; None: one for each core that this process may use."""
        self.count = count or len(os.sched_getaffinity(0))

    def __enter__(self) -> Workers:
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(
            self.count,
            thread_name_prefix="compress",
            initializer=torch.set_num_threads,
            initargs=(1,),
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._before)

    def map(self, function: Callable[[Given], Found], items: Iterable[Given]) -> list[Found]:
        """`function` of each, in their order, without gradients."""
        found: list[Found] = []
        self.ordered(function, items, found.append)
        return found

    def ordered(
        self,
        function: Callable[[Given], Found],
        items: Iterable[Given],
        take: Callable[[Found], None],
    ) -> None:
        """Hand what `function` gives to `take`, in the order of the items, in this thread.

        So much is computed ahead as there are workers, and no more is kept.
        """
        waiting: deque[Future[Found]] = deque()
        for item in items:
            if len(waiting) > self.count:
                take(waiting.popleft().result())
            waiting.append(self._pool.submit(_without_gradients, function, item))
        while waiting:
            take(waiting.popleft().result())


def _without_gradients(function: Callable[[Given], Found], item: Given) -> Found:
    with torch.no_grad():  # of this thread
        return function(item)
