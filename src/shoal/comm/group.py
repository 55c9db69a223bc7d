"""Collectives between the replicas of one axis, with every byte and second counted.

A `Group` is either torch collectives between processes, or slots in shared memory between threads
(`comm/threads.py`). It knows tensors and ranks, nothing of models.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.errors import PeersLost
from shoal.observe.pulse import Pulse
from shoal.runtime import complete, new_group, wait_for


@dataclass
class Traffic:
    """What crossed, and how long it took, since the last `take`."""

    sent_bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """By operation."""
    sent_to: dict[int | str, int] = field(default_factory=lambda: defaultdict(int))
    """By link: the rank that they went to, or the name of who is none. What ranks of one replica
    send one another inside the model is in `sent_bytes` alone."""
    communication_seconds: float = 0.0
    waiting_seconds: float = 0.0
    on_sent: Callable[..., None] | None = None
    """Called when an operation is over; a trace hangs here (Trace.sent)."""

    def count(
        self, operation: str, num_bytes: int, *, began: float, waited: float | None = None
    ) -> None:
        """An operation is over in which this rank sent `num_bytes`.

        `waited`: since when it waited, if it has computed beside that before.
        """
        ended, waited = time.perf_counter(), began if waited is None else waited
        self.sent_bytes[operation] += num_bytes
        self.communication_seconds += ended - waited
        if self.on_sent is not None:
            self.on_sent(operation, began=began, waited=waited, ended=ended, num_bytes=num_bytes)

    def wait(self, *, began: float) -> None:
        """This rank has waited for the others."""
        ended = time.perf_counter()
        self.waiting_seconds += ended - began
        if self.on_sent is not None:
            self.on_sent("wait", began=began, waited=began, ended=ended, num_bytes=0)

    def went(self, to: Mapping[int | str, int]) -> None:
        """Note on which links bytes have gone that are counted by their operation as well."""
        for link, num_bytes in to.items():
            self.sent_to[link] += num_bytes

    def take(self) -> Traffic:
        """The counts so far; starts again from zero."""
        sent = dict(self.sent_bytes), dict(self.sent_to)
        taken = Traffic(*sent, self.communication_seconds, self.waiting_seconds)
        self.sent_bytes.clear()
        self.sent_to.clear()
        self.forget_seconds()
        return taken

    def forget_seconds(self) -> None:
        """Times begin anew from zero; what has crossed still counts."""
        self.communication_seconds = self.waiting_seconds = 0.0


_Value = TypeVar("_Value")


class Pending(Generic[_Value]):
    """A collective under way; others may be called meanwhile, in the same order on all ranks."""

    def __init__(self, wait: Callable[[], _Value]) -> None:
        self._wait = wait

    def wait(self) -> _Value:
        """What it gives, once it is there. Raises PeersLost."""
        return self._wait()


class Group(ABC):
    """Ranks that meet in collectives. All ranks call the same operations in the same order."""

    rank: int
    size: int
    shares_memory: bool
    """Whether ranks are threads that see one another's tensors."""

    def __init__(self, *, pulse: Pulse | None = None) -> None:
        self.traffic = Traffic()
        self.pulse = pulse or Pulse()

    @abstractmethod
    def sum_(self, tensor: Tensor) -> None:
        """Replace `tensor` on every rank by the sum over ranks (same shape and dtype on all)."""

    def begin_sum_(self, tensor: Tensor) -> Callable[[], None]:
        """Begin `sum_`, which goes on while this rank computes; what is returned ends it.

        Several may be under way; all ranks begin them, and end them, in one order. Both raise
        PeersLost.
        """
        return lambda: self.sum_(tensor)

    @abstractmethod
    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's `tensor`, in rank order (same shape and dtype on all)."""

    @abstractmethod
    def broadcast_(self, tensor: Tensor, *, source: int = 0) -> None:
        """Replace `tensor` on every rank by that of `source`."""

    @abstractmethod
    def barrier(self) -> None:
        """Return when every rank has called it; the time spent counts as waiting."""

    @abstractmethod
    def buffer(self, numel: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A zeroed flat tensor: one for all ranks where they share memory, else one per rank."""

    @abstractmethod
    def slices(self, own: list[Tensor], bounds: list[tuple[int, int]]) -> list[list[Tensor]]:
        """Part `bounds[rank]` of every flat tensor of every rank: result[rank][index].

        Every rank passes the same number of equally long tensors; `bounds` cover them in order.
        The results may be views.
        """

    @abstractmethod
    def assemble_(self, tensor: Tensor, bounds: list[tuple[int, int]]) -> None:
        """Fill flat `tensor` on every rank: part `bounds[r]` comes from rank r."""

    @abstractmethod
    def swap(self, tensor: Tensor, *, to: int, source: int) -> Tensor:
        """Send `tensor` to rank `to` and get that of rank `source` (same shape and dtype on all).

        Every rank calls it, and is somebody's `source` exactly once.
        """

    @abstractmethod
    def start_sum(self, tensor: Tensor) -> Pending[Tensor]:
        """Begin a `sum_`; leave `tensor` alone until its `wait` gives it, summed."""

    @abstractmethod
    def start_gather(self, tensor: Tensor) -> Pending[list[Tensor]]:
        """Begin a `gather`; leave `tensor` alone until its `wait` gives everybody's."""

    @abstractmethod
    def part(self, ranks: Sequence[int], *, world: Group) -> Group:
        """Some of the ranks, this one among them, in their order; each rank is in one part.

        `world`: all ranks there are, which all call it with some such part of a group of their own.
        Raises PeersLost.
        """

    @property
    def computes_in_place(self) -> bool:
        """Whether one rank's update of a buffer is seen by all (so work is split by slices)."""
        return self.shares_memory and self.size > 1


def broadcast_to(rank: int, *, size: int, source: int) -> list[int]:
    """The ranks that `rank` sends on to what `source` has: down a binomial tree."""
    place, steps = (rank - source) % size, (size - 1).bit_length()
    places = (place + (1 << step) for step in range(place.bit_length(), steps))
    return [(each + source) % size for each in places if each < size]


_Result = TypeVar("_Result")
_LOST = re.compile(r"gloo|NCCL|[Cc]onnection|ProcessGroup|process group", re.ASCII)


def watched(call: Callable[[], _Result]) -> _Result:
    """What `call` gives; it computes, with collectives of torch in between.

    Raises PeersLost when one of them ended because a rank went; other errors as they are.
    """
    problem = None
    try:
        return call()
    except RuntimeError as error:
        problem = str(error).partition("\n")[0]
        if not _LOST.search(problem) or isinstance(error, torch.OutOfMemoryError):
            raise
    # outside of the handler: its traceback would keep the group alive
    raise PeersLost(f"a collective inside the model did not complete: {problem}")


class ProcessGroup(Group):
    """Ranks are processes; collectives are torch.distributed's (gloo or NCCL).

    `group` None is the group of all processes, which must have been started; a single process
    needs none. `alone`: this rank by itself, though there are others. When a rank dies, the
    operation under way raises PeersLost on the others, and `reopen` makes this object the
    group of the next generation.
    """

    shares_memory = False

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        pulse: Pulse | None = None,
        alone: bool = False,
    ) -> None:
        super().__init__(pulse=pulse)
        self._group, self._alone = group, alone
        self.reopen()

    def reopen(self) -> None:
        """Read rank and size anew: another process group was started since."""
        started = dist.is_initialized() and not self._alone
        self._members = dist.get_process_group_ranks(self._group) if started else [0]
        self.rank = dist.get_rank(self._group) if started else 0
        self.size = dist.get_world_size(self._group) if started else 1

    def _timed(self, name: str, to: dict[int, int], call: Callable[[], object]) -> None:
        """`to`: bytes that go to each rank of this group."""
        began, num_bytes = time.perf_counter(), sum(to.values())
        self._meet(name, num_bytes, call)
        self.traffic.count(name, num_bytes, began=began)
        self._went(to)

    def _went(self, to: dict[int, int]) -> None:
        self.traffic.went({self._members[rank]: num_bytes for rank, num_bytes in to.items()})

    def _meet(self, name: str, num_bytes: int, call: Callable[[], object]) -> None:
        self.pulse.enter(name, num_bytes=num_bytes)
        problem = None
        try:
            call()
        except RuntimeError as error:  # what gloo and NCCL raise when a connection ends
            problem = str(error).partition("\n")[0]
        if problem is not None:  # outside of the handler: its traceback would keep the group alive
            raise PeersLost(f"{name} of {num_bytes} bytes did not complete: {problem}")
        self.pulse.leave()

    def sum_(self, tensor: Tensor) -> None:
        if self.size > 1:
            call = lambda: complete(dist.all_reduce, tensor, group=self._group)  # noqa: E731
            self._timed("all_reduce", self._summed_to(tensor), call)

    def begin_sum_(self, tensor: Tensor) -> Callable[[], None]:
        to = self._summed_to(tensor)
        sent, began, problem = sum(to.values()), time.perf_counter(), None
        try:
            work = dist.all_reduce(tensor, group=self._group, async_op=True)
        except RuntimeError as error:
            problem = str(error).partition("\n")[0]
        if problem is not None:
            raise PeersLost(f"all_reduce of {sent} bytes did not begin: {problem}")
        self.pulse.begin(sent)

        def finish() -> None:
            self.pulse.end(sent)
            waited = time.perf_counter()
            self._meet("all_reduce", sent, lambda: wait_for(work, group=self._group))
            self.traffic.count("all_reduce", sent, began=began, waited=waited)
            self._went(to)

        return finish

    # Who sends to whom is gloo's (torch 2.13): a sum goes round one way, a gather the other, and a
    # broadcast down a binomial tree. NCCL sends as many bytes, but may choose other neighbours.

    def _summed_to(self, tensor: Tensor) -> dict[int, int]:
        return {(self.rank - 1) % self.size: 2 * (self.size - 1) * tensor.nbytes // self.size}

    def _gathered_to(self, tensor: Tensor) -> dict[int, int]:
        return {(self.rank + 1) % self.size: (self.size - 1) * tensor.nbytes}

    def gather(self, tensor: Tensor) -> list[Tensor]:
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        call = lambda: complete(dist.all_gather, parts, tensor, group=self._group)  # noqa: E731
        self._timed("all_gather", self._gathered_to(tensor), call)
        return parts

    def broadcast_(self, tensor: Tensor, *, source: int = 0) -> None:
        if self.size > 1:
            send = partial(dist.broadcast, group_src=source)
            call = lambda: complete(send, tensor, group=self._group)  # noqa: E731
            to = dict.fromkeys(
                broadcast_to(self.rank, size=self.size, source=source), tensor.nbytes
            )
            self._timed("broadcast", to, call)

    def barrier(self) -> None:
        if self.size > 1:
            began = time.perf_counter()
            self._meet("barrier", 0, lambda: complete(dist.barrier, group=self._group))
            self.traffic.wait(began=began)

    def buffer(self, numel: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(numel, dtype=dtype, device=device)

    def slices(self, own: list[Tensor], bounds: list[tuple[int, int]]) -> list[list[Tensor]]:
        if self.size == 1:
            return [[tensor[slice(*bounds[0])] for tensor in own]]
        sizes = [stop - start for start, stop in bounds]
        own_size = sizes[self.rank]
        received: list[list[Tensor]] = [[] for _ in range(self.size)]
        for tensor in own:
            landing = tensor.new_empty(own_size * self.size)
            self._exchange(tensor, landing, sizes=sizes, own_size=own_size)
            for rank, part in enumerate(landing.view(self.size, own_size)):
                received[rank].append(part)
        return received

    def _exchange(
        self, tensor: Tensor, landing: Tensor, *, sizes: list[int], own_size: int
    ) -> None:
        received = [own_size] * self.size
        call = lambda: complete(  # noqa: E731
            dist.all_to_all_single, landing, tensor, received, sizes, group=self._group
        )
        others = (rank for rank in range(self.size) if rank != self.rank)
        to = {rank: sizes[rank] * tensor.element_size() for rank in others}
        self._timed("all_to_all", to, call)

    def swap(self, tensor: Tensor, *, to: int, source: int) -> Tensor:
        if to == self.rank:
            return tensor.clone()
        received, group = torch.empty_like(tensor), self._group

        def call() -> None:
            ways = [
                dist.P2POp(dist.isend, tensor, group=group, group_peer=to),
                dist.P2POp(dist.irecv, received, group=group, group_peer=source),
            ]
            for work in dist.batch_isend_irecv(ways):
                work.wait()

        self._timed("send", {to: tensor.nbytes}, call)
        return received

    def start_sum(self, tensor: Tensor) -> Pending[Tensor]:
        if self.size == 1:
            return Pending(lambda: tensor)
        begin = lambda: dist.all_reduce(tensor, group=self._group, async_op=True)  # noqa: E731
        return self._started("all_reduce", self._summed_to(tensor), begin, tensor)

    def start_gather(self, tensor: Tensor) -> Pending[list[Tensor]]:
        if self.size == 1:
            return Pending(lambda: [tensor])
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        begin = lambda: dist.all_gather(parts, tensor, group=self._group, async_op=True)  # noqa: E731
        return self._started("all_gather", self._gathered_to(tensor), begin, parts)

    def _started(
        self, name: str, to: dict[int, int], begin: Callable[[], Any], result: _Value
    ) -> Pending[_Value]:
        """Begin now; its bytes count now, and the time that is waited for it when it is."""
        works: list[Any] = []
        num_bytes = sum(to.values())
        self._meet(name, num_bytes, lambda: works.append(begin()))
        self.traffic.sent_bytes[name] += num_bytes
        self._went(to)
        self.pulse.begin(num_bytes)

        def wait() -> _Value:
            self.pulse.end(num_bytes)
            began = time.perf_counter()
            self._meet(name, num_bytes, lambda: wait_for(works[0], group=self._group))
            self.traffic.communication_seconds += time.perf_counter() - began
            return result

        return Pending(wait)

    def part(self, ranks: Sequence[int], *, world: Group) -> Group:
        own = [self._members[rank] for rank in ranks]
        padded = torch.full((world.size,), -1)
        padded[: len(own)] = torch.tensor(own)
        lists = {tuple(each[each >= 0].tolist()) for each in world.gather(padded)}
        made = ProcessGroup(pulse=self.pulse, alone=True)
        for each in sorted(lists):  # every rank has to make every group
            if len(each) > 1:
                found = watched(partial(new_group, list(each)))
                made = ProcessGroup(found, pulse=self.pulse) if list(each) == own else made
        made.traffic = self.traffic
        return made

    def assemble_(self, tensor: Tensor, bounds: list[tuple[int, int]]) -> None:
        for source, (start, stop) in enumerate(bounds):
            if stop > start:
                self.broadcast_(tensor[start:stop], source=source)
