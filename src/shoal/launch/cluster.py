"""Which hosts a run has, where its generations meet, and which ranks go to which host."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shoal.layout import Layout


@dataclass(frozen=True)
class Host:
    """One machine."""

    name: str
    address: str


class Cluster(Protocol):
    """What there is to run on."""

    def hosts(self) -> list[Host]:
        """The hosts, in the order in which they are filled."""

    def meeting(self, generation: int) -> str:
        """Where the ranks of a generation meet: a URL that no other generation has."""

    def servers(self) -> Path:
        """A folder, private to this user, where parameter servers leave their addresses."""


@dataclass(frozen=True)
class ThisHost:
    """A cluster of one: generations meet at new files in a folder."""

    folder: Path

    def hosts(self) -> list[Host]:
        return [Host("localhost", "127.0.0.1")]

    def meeting(self, generation: int) -> str:
        return (self.folder / f"generation-{generation:06d}").as_uri()

    def servers(self) -> Path:
        return self.folder / "servers"


def host_of_rank(layout: Layout, rank: int, *, num_hosts: int) -> int:
    """Number of the host that `rank` runs on: whole replicas, as evenly as they can be."""
    return layout.replica_of(rank) * num_hosts // layout.replicate
