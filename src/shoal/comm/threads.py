"""Ranks as threads of one process: collectives through slots in shared memory.

Each thread keeps its own gradients; parameters and optimizer state are one copy for all. A sum is
computed by slices: rank r adds slice r of everybody's tensor, in rank order, so that every rank
sees the same bits. A thread that fails breaks the barrier, and the others fail at once with the
reason instead of waiting for it.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shoal.comm.group import Group, Pending, broadcast_to
from shoal.errors import WorkerError
from shoal.observe.pulse import Pulse


class Meeting:
    """What the threads of one process share: a barrier, slots, and the reason of a failure."""

    def __init__(self, size: int, *, timeout_seconds: float) -> None:
        self.size = size
        # Two sets, used in turn: a thread can write into a set again only after a meeting that
        # everybody reaches after reading it.
        self.slots: tuple[list[Any], list[Any]] = ([None] * size, [None] * size)
        self.failure: str | None = None
        self._barrier = threading.Barrier(size, timeout=timeout_seconds)
        self.timeout_seconds = timeout_seconds

    def wait(self) -> None:
        """Meet the other threads. Raises WorkerError when one failed or never came."""
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            reason = self.failure or f"a thread did not come within {self.timeout_seconds:.0f} s"
            raise WorkerError(f"the threads no longer meet: {reason}") from None

    def fail(self, reason: str) -> None:
        """Release every waiting thread with an error; the first reason is kept."""
        if self.failure is None:
            self.failure = reason
        self._barrier.abort()


class ThreadGroup(Group):
    """One thread's view of a `Meeting`."""

    shares_memory = True

    def __init__(self, meeting: Meeting, *, rank: int, pulse: Pulse | None = None) -> None:
        super().__init__(pulse=pulse)
        self._meeting = meeting
        self.rank, self.size = rank, meeting.size
        self._turn = 0

    def _exchange(self, value: Any) -> list[Any]:
        """Everybody's `value`, in rank order."""
        slots = self._meeting.slots[self._turn]
        self._turn = 1 - self._turn
        slots[self.rank] = value
        self._wait()
        return list(slots)

    def _wait(self) -> None:
        began = time.perf_counter()
        self.pulse.enter("meeting", num_bytes=0)
        self._meeting.wait()
        self.pulse.leave()
        self.traffic.wait(began=began)

    def sum_(self, tensor: Tensor) -> None:
        if self.size == 1:
            return
        flat = tensor.view(-1)
        views = self._exchange(flat)
        began = time.perf_counter()
        start, stop = self._bounds(flat.numel())[self.rank]
        total = views[0][start:stop].clone()
        for other in views[1:]:
            total += other[start:stop]
        self.traffic.communication_seconds += time.perf_counter() - began
        parts = self._exchange(total)  # nobody reads `flat` any more once all are here
        began = time.perf_counter()
        torch.cat(parts, out=flat)
        self.traffic.communication_seconds += time.perf_counter() - began
        self.traffic.sent_bytes["all_reduce"] += 2 * (self.size - 1) * tensor.nbytes // self.size
        self._wait()  # `total` and `flat` may be used again

    def gather(self, tensor: Tensor) -> list[Tensor]:
        if self.size == 1:
            return [tensor]
        parts = [part.clone() for part in self._exchange(tensor)]
        self.traffic.sent_bytes["all_gather"] += (self.size - 1) * tensor.nbytes
        self._wait()
        return parts

    def broadcast_(self, tensor: Tensor, *, source: int = 0) -> None:
        if self.size == 1:
            return
        views = self._exchange(tensor)
        if self.rank != source:
            tensor.copy_(views[source])
        copies = len(broadcast_to(self.rank, size=self.size, source=source))
        self.traffic.sent_bytes["broadcast"] += copies * tensor.nbytes
        self._wait()

    def barrier(self) -> None:
        if self.size > 1:
            self._wait()

    def buffer(self, numel: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        own = torch.zeros(numel, dtype=dtype, device=device) if self.rank == 0 else None
        shared: Tensor = self._exchange(own)[0]
        self._wait()
        return shared

    def slices(self, own: list[Tensor], bounds: list[tuple[int, int]]) -> list[list[Tensor]]:
        """Views of the other threads' tensors; valid until the next collective."""
        start, stop = bounds[self.rank]
        everybody = self._exchange(own)
        views = [[tensor[start:stop] for tensor in theirs] for theirs in everybody]
        self._wait()
        return views

    def assemble_(self, tensor: Tensor, bounds: list[tuple[int, int]]) -> None:
        """Copy the others' parts, unless all ranks pass the same memory."""
        views = self._exchange(tensor)
        for source, (start, stop) in enumerate(bounds):
            if views[source].data_ptr() != tensor.data_ptr():
                tensor[start:stop].copy_(views[source][start:stop])
        self._wait()

    def swap(self, tensor: Tensor, *, to: int, source: int) -> Tensor:
        received: Tensor = self._exchange(tensor)[source].clone()
        if to != self.rank:
            self.traffic.sent_bytes["send"] += tensor.nbytes
        self._wait()
        return received

    def start_sum(self, tensor: Tensor) -> Pending[Tensor]:
        """Done at once: threads have nothing to wait for but one another."""
        self.sum_(tensor)
        return Pending(lambda: tensor)

    def start_gather(self, tensor: Tensor) -> Pending[list[Tensor]]:
        """Done at once."""
        parts = self.gather(tensor)
        return Pending(lambda: parts)

    def part(self, ranks: Sequence[int], *, world: Group) -> Group:
        wait = self._meeting.timeout_seconds
        own = Meeting(len(ranks), timeout_seconds=wait) if self.rank == ranks[0] else None
        meeting = self._exchange(own)[ranks[0]]
        made = ThreadGroup(meeting, rank=list(ranks).index(self.rank), pulse=self.pulse)
        made.traffic = self.traffic
        self._wait()
        return made

    def _bounds(self, numel: int) -> list[tuple[int, int]]:
        edges = [numel * rank // self.size for rank in range(self.size + 1)]
        return list(itertools.pairwise(edges))
