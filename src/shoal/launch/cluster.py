"""Which hosts a run has, and where its generations meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shoal.engine.job import Job
from shoal.errors import ShoalError
from shoal.launch.object_store import Say, placed
from shoal.launch.site import Site

Event = tuple[str, dict[str, Any]]
"""Its name and its fields."""


@dataclass(frozen=True)
class Host:
    """One machine."""

    name: str
    address: str


class NotYet(ShoalError):
    """A generation cannot begin just now; ask again."""


class Cluster(Protocol):
    """What there is to run on."""

    def hosts(self) -> list[Host]:
        """The hosts, in the order in which they are filled."""

    def meeting(self, generation: int, *, hosts: Sequence[str] = ()) -> str:
        """Where the ranks of a generation meet: a URL that no other generation has.

        `hosts`: of its ranks, in their order. Raises NotYet.
        """

    @property
    def registered(self) -> int:
        """The number by which a registry knows the generation met for last; 0: there is none."""

    @property
    def own_disks(self) -> bool:
        """Whether hosts share no storage: each saves on its own disk."""

    @property
    def whole_saves(self) -> bool:
        """Whether each host has whole replicas, all alike, so that it saves all of it."""

    @property
    def own_folders(self) -> bool:
        """Whether hosts share no run folder, wherever they save."""

    def placed(self, job: Job, *, say: Say, begins: bool = False) -> Job:
        """The job with the save that it goes on from, if any, which all hosts see from now on.

        `begins`: the run is a new one. Raises RunError.
        """

    def saved(self, fields: Mapping[str, Any]) -> None:
        """A save was published, as its event says."""

    def kept(self, site: Site, fields: Mapping[str, Any]) -> None:
        """A host has a save on its own disk."""

    def look(self, *, last: bool = False) -> list[Event]:
        """Called again and again, while the run goes on: what has happened, to be told.

        `last`: nothing follows, so what is under way is waited for.
        """

    def ended(self, *, status: int) -> None:
        """The run has ended in order, with this exit status."""

    def servers(self) -> Path:
        """A folder, private to this user, where parameter servers leave their addresses."""


@dataclass(frozen=True)
class ThisHost:
    """A cluster of one: generations meet at new files in a folder."""

    folder: Path

    def hosts(self) -> list[Host]:
        return [Host("localhost", "127.0.0.1")]

    def meeting(self, generation: int, *, hosts: Sequence[str] = ()) -> str:
        return (self.folder / f"generation-{generation:06d}").as_uri()

    @property
    def registered(self) -> int:
        return 0

    @property
    def own_disks(self) -> bool:
        return False

    @property
    def whole_saves(self) -> bool:
        return True

    @property
    def own_folders(self) -> bool:
        return False

    def placed(self, job: Job, *, say: Say, begins: bool = False) -> Job:
        return placed(job, begins=begins, say=say)

    def saved(self, fields: Mapping[str, Any]) -> None:
        return

    def kept(self, site: Site, fields: Mapping[str, Any]) -> None:
        raise AssertionError("one host has one disk")

    def look(self, *, last: bool = False) -> list[Event]:
        return []

    def ended(self, *, status: int) -> None:
        return

    def servers(self) -> Path:
        return self.folder / "servers"
