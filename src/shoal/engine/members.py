"""Membership of a run: which ranks belong together, epoch after epoch.

An epoch is a fixed set of ranks with a process group of its own. The supervisor announces it; a
rank that loses a peer leaves its epoch, nothing applied, and joins the next one. Workers that
nobody supervises (torchrun, threads) have one epoch, and a loss is the end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from shoal.comm.group import Group, ProcessGroup
from shoal.comm.keys import Keys
from shoal.engine.orders import Orders
from shoal.errors import PeersLost, WorkerError
from shoal.observe.events import Report
from shoal.runtime import Place, start_process_group, stop_process_group, wait_for_arrivals

TIMEOUT_SECONDS = 1800.0
"""Of a collective; the supervisor notices long before."""


class Members(ABC):
    """What the loop asks about membership."""

    keys: Keys | None = None
    """For handing state from one rank to another."""

    @property
    @abstractmethod
    def pending(self) -> bool:
        """Whether another epoch was announced: all ranks leave after the step under way."""

    @abstractmethod
    def join(self, lost: PeersLost | None = None) -> None:
        """Enter the newest epoch. `lost`: why the last one broke. Raises it when none follows."""


class Fixed(Members):
    """One epoch, already entered."""

    pending = False

    def join(self, lost: PeersLost | None = None) -> None:
        if lost is not None:
            raise lost


class Epochs(Members):
    """Epochs as the supervisor announces them, over processes."""

    def __init__(
        self,
        group: ProcessGroup,
        *,
        orders: Orders,
        place: Place,
        report: Report,
        keys: Keys | None,
    ) -> None:
        self._group, self._orders = group, orders
        self._place, self._report = place, report
        self.number, self.keys = 0, keys
        group.pulse.on_phase = self._leave_early

    @property
    def pending(self) -> bool:
        return self._orders.newer_than(self.number) is not None

    def _leave_early(self, phase: str) -> None:
        """Raise PeersLost at a pass whose sum cannot complete, instead of computing it first."""
        if phase in ("forward", "backward") and self._orders.broken_epoch == self.number:
            raise PeersLost(f"epoch {self.number} lost a rank, as its supervisor says")

    def join(self, lost: PeersLost | None = None) -> None:
        pulse = self._group.pulse
        pulse.mark("waiting for an epoch")
        stop_process_group(at_once=True)  # releases the others, who then come here too
        text = None if lost is None else str(lost)
        self._report.say("waiting", epoch=self.number, lost=text)
        while not self._enter():
            self._report.say("waiting", epoch=self.number, lost="the others did not come")
        self._group.reopen()
        pulse.join(epoch=self.number, rank=self._group.rank)
        pulse.mark("agreeing")
        self._report.say("joined", epoch=self.number)

    def _enter(self) -> bool:
        epoch = self._orders.wait_for_newer(self.number, timeout_seconds=TIMEOUT_SECONDS)
        if epoch is None:
            raise WorkerError(f"no epoch after {self.number} in {TIMEOUT_SECONDS:.0f} s")
        self.number = epoch.number
        if epoch.size == 1:
            return True
        came = wait_for_arrivals(
            epoch.store, rank=epoch.rank, size=epoch.size, give_up=lambda: self.pending
        )
        if not came:
            return False
        self._group.pulse.mark("meeting the others")
        try:
            start_process_group(
                rank=epoch.rank,
                size=epoch.size,
                device=self._place.device,
                store=epoch.store,
                timeout_seconds=TIMEOUT_SECONDS,
            )
        except RuntimeError:  # one died between arriving and connecting; another epoch will come
            stop_process_group(at_once=True)
            return False
        return True


def members_of(
    group: Group,
    *,
    orders: Orders,
    place: Place,
    report: Report,
    supervised: bool,
    keys: Keys | None,
) -> Members:
    """The membership that fits how this worker was started."""
    if supervised and isinstance(group, ProcessGroup):
        return Epochs(group, orders=orders, place=place, report=report, keys=keys)
    return Fixed()
