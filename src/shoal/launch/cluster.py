"""Which hosts a run has, and where its generations meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shoal.errors import ShoalError


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

    def saved(self, fields: Mapping[str, Any]) -> None:
        """A save was published, as its event says."""

    def look(self) -> None:
        """Called again and again, while the run goes on."""

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

    def saved(self, fields: Mapping[str, Any]) -> None:
        return

    def look(self) -> None:
        return

    def ended(self, *, status: int) -> None:
        return

    def servers(self) -> Path:
        return self.folder / "servers"
