"""Membership of a run: which ranks belong together, generation after generation.

A generation is a fixed set of ranks with a process group of its own. The supervisor announces it; a
rank that loses a peer leaves its generation, nothing applied, and joins the next one. Workers that
nobody supervises (torchrun, threads) have one generation, and a loss is the end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from shoal.comm.group import Group, ProcessGroup
from shoal.comm.keys import Keys
from shoal.comm.link import SlowLink
from shoal.engine.membership.orders import Disk, Generation, Orders
from shoal.errors import PeersLost, WorkerError
from shoal.observe.events import Report
from shoal.runtime import (
    MeetingPoint,
    WorkerInfo,
    meeting_point,
    now_in,
    start_process_group,
    stop_process_group,
)

TIMEOUT_SECONDS = 1800.0
"""Of a collective; the supervisor notices long before."""


class Members(ABC):
    """What the loop asks about membership."""

    keys: Keys | None = None
    """For handing state from one rank to another."""
    address = "127.0.0.1"
    """This host's, as the other ranks reach it."""
    is_fixed = False
    """Whether nobody replaces a lost rank: a loss is the end."""
    registered = 0
    """Number of the generation, where its coordinator says which of its saves count."""
    disk: Disk | None = None
    """Which ranks save on this rank's disk, where hosts share none."""

    @property
    @abstractmethod
    def pending(self) -> bool:
        """Whether another generation was announced: all ranks leave after the step under way."""

    def check(self) -> None:
        """Raises PeersLost when what is about to be computed cannot be summed any more."""
        return

    @abstractmethod
    def join(self, lost: PeersLost | None = None) -> None:
        """Enter the newest generation. `lost`: why the last one broke; raised when none follows."""


class Fixed(Members):
    """One generation, already entered."""

    pending = False
    is_fixed = True

    def join(self, lost: PeersLost | None = None) -> None:
        if lost is not None:
            raise lost


class Generations(Members):
    """Generations as the supervisor announces them, over processes."""

    def __init__(
        self,
        group: ProcessGroup,
        *,
        orders: Orders,
        worker: WorkerInfo,
        report: Report,
        keys: Keys | None,
        link: SlowLink | None = None,
    ) -> None:
        self._link = link
        self._group, self._orders = group, orders
        self._worker, self._report = worker, report
        self.number, self.keys = 0, keys

    @property
    def pending(self) -> bool:
        return self._orders.newer_than(self.number) is not None

    def check(self) -> None:
        if self._orders.broken_generation == self.number:
            raise PeersLost(f"generation {self.number} lost a rank, as its supervisor says")

    def join(self, lost: PeersLost | None = None) -> None:
        pulse = self._group.pulse
        pulse.mark("waiting for a generation")
        stop_process_group(at_once=True)  # releases the others, who then come here too
        text = None if lost is None else str(lost)
        self._report.say("waiting", generation=self.number, lost=text)
        while not self._enter():
            self._report.say("waiting", generation=self.number, lost="the others did not come")
        self._group.reopen()
        pulse.join(generation=self.number, rank=self._group.rank)
        pulse.mark("agreeing")
        self._report.say("joined", generation=self.number)

    def _enter(self) -> bool:
        generation = self._orders.wait_for_newer(self.number, timeout_seconds=TIMEOUT_SECONDS)
        if generation is None:
            raise WorkerError(f"no generation after {self.number} in {TIMEOUT_SECONDS:.0f} s")
        self.number = generation.number
        self.disk = generation.disk
        counted = generation.registered or generation.disk is not None
        self.registered = generation.number if counted else 0
        now_in(self.number)
        if generation.size == 1:
            return True
        rank, size = generation.rank, generation.size
        try:
            place = meeting_point(generation.meeting)
            if not place.wait_for_arrivals(rank=rank, size=size, give_up=lambda: self._over):
                return False
            self._group.pulse.mark("meeting the others")
            self._meet(place, generation)
        except RuntimeError:  # one died between arriving and connecting; another one will come
            stop_process_group(at_once=True)
            return False
        self.address = place.address
        return True

    @property
    def _over(self) -> bool:
        """Whether the generation that this rank enters will not come about."""
        return self.pending or self._orders.broken_generation == self.number

    def _meet(self, place: MeetingPoint, generation: Generation) -> None:
        start_process_group(
            rank=generation.rank,
            size=generation.size,
            device=self._worker.device,
            meeting=place,
            timeout_seconds=TIMEOUT_SECONDS,
            around=self._link.around(generation.rank) if self._link is not None else None,
            here=generation.here,
        )
        if self._link is not None:
            self._link.check(generation.size)


def members_of(
    group: Group,
    *,
    orders: Orders,
    worker: WorkerInfo,
    report: Report,
    supervised: bool,
    keys: Keys | None,
    link: SlowLink | None = None,
) -> Members:
    """The membership that fits how this worker was started."""
    if supervised and isinstance(group, ProcessGroup):
        return Generations(group, orders=orders, worker=worker, report=report, keys=keys, link=link)
    return Fixed()
