"""What is written into a registry: who takes part, which generation counts, which save is the last.

Steps are ordered by (generation in which they were applied, step), as Raft orders its log by (term,
index): a rank that was cut off may have taken a step that the others took otherwise.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import msgspec

MOST_BYTES = 1 << 20
"""Of one record: etcd takes 1.5 MiB in a request."""

Text = Annotated[str, msgspec.Meta(max_length=4096)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class Standing(NamedTuple):
    """How far a state is: the generation that applied its last step, and that step."""

    generation: int
    step: int


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bytes that another host wrote: nothing of it is used before its types are right."""


class Spec(_Record, frozen=True):
    """What all hosts of a run must have alike."""

    shoal: Text
    torch: Text
    code: Text
    """Hash of shoal's own source."""
    recipe: Annotated[str, msgspec.Meta(max_length=MOST_BYTES // 4)]
    """The recipe as it runs, as JSON."""
    data: Text
    """Hash of the sources' content (prepare.source_digest)."""
    run: Text
    """The run folder, by its path."""


class HostFacts(_Record, frozen=True):
    """One host that takes part, as long as its lease lasts."""

    host: Text
    """Its name and a random part for each boot: a host that comes back is another one."""
    name: Text
    address: Text
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    """Of its agent."""
    cores: Count
    memory_bytes: Count = 0
    devices: tuple[Text, ...] = ()
    samples_per_second: float = 0.0
    """As measured; 0: not yet."""
    standing: tuple[Count, Count] = (0, 0)
    """Of the state that its workers hold."""
    cannot_reach: tuple[Text, ...] = ()
    """Hosts that it could not connect to."""


class Slot(_Record, frozen=True):
    """One rank of a generation: a worker of a host."""

    host: Text
    worker: Count


class Generation(_Record, frozen=True):
    """Who trains together from now on; whoever reads it obeys it."""

    number: Count
    coordinator: Text
    slots: tuple[Slot, ...]
    """In rank order."""
    meet: Text
    """Where its ranks find one another: file://... or tcp://ADDRESS:PORT."""
    base: tuple[Count, Count]
    """Where it goes on from."""
    shares: tuple[Count, ...] = ()
    """Samples of the global batch by replica; none: equal ones."""
    reason: Text = ""
    nonce: Text = ""


class Saved(_Record, frozen=True):
    """A save that counts."""

    generation: Count
    step: Count
    place: Text
    """The folder, or where it lies on the storage that hosts share."""
    manifest: Text
    """Hash of its manifest."""
    holders: dict[Text, tuple[Text, ...]] = {}
    """Where files lie on local disks: hosts by name of the file."""

    @property
    def standing(self) -> Standing:
        """Where a run that loads it goes on."""
        return Standing(self.generation, self.step)


class Ask(_Record, frozen=True):
    """What a person or a scheduler wants of the run."""

    what: Literal["save", "stop", "drain"]
    host: Text = ""
    """Of drain: which host to do without."""
