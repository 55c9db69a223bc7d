"""What a coordinator and the agent of a host say to each other: messages with types and limits.

Nothing of a message is used before its types are right. A worker is known by the number that the
coordinator gave it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import xxhash

from shoal.checkpoint.disks import Commit, Kept
from shoal.launch.hang import Sighting
from shoal.launch.links import Measured

LEASE_SECONDS = 6.0
"""After so long without a word the other end counts as dead."""
SIGN_SECONDS = 0.5
"""So often an end says at least something."""

Text = Annotated[str, msgspec.Meta(max_length=1 << 16)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class _Message(msgspec.Struct, forbid_unknown_fields=True, frozen=True, tag=True, kw_only=True):
    pass


class Hello(_Message, frozen=True):
    """A coordinator begins to use a host."""

    coordinator: Text
    """Whose it is, for messages."""
    nonce: Text
    """Of its process: another one waits until this one is silent."""
    run: Text
    lease_seconds: float = LEASE_SECONDS
    ranks: Count = 0
    """Of the run; 0: it only asks who is there."""
    folders: dict[Text, Text] = {}
    """What workers will read, and the digest of each (`folder_digest`)."""
    note: tuple[Text, Text] = ("", "")
    """A file in the run folder, and what stands in it."""
    cache_note: tuple[Text, Text] = ("", "")
    """The same in the coordinator's cache: who sees it need not check what the coordinator has."""
    term: Count = 0
    """In which it leads, by the run's registry: hosts go over to whoever leads in a later one."""
    keep_seconds: float = 0.0
    """How long workers outlive its silence, for the next coordinator to take them on."""
    adopts: bool = False
    """Whether it takes on what runs there for the coordinator before it."""
    own_disks: bool = False
    """Whether each host has a run folder of its own, on a disk that no other one sees."""
    store: Text = ""
    """The URL to which its workers save, where they do."""


class Start(_Message, frozen=True):
    """Start a worker."""

    worker: Count
    target: Text
    payload: dict[str, Any]
    kind: Literal["rank", "server", "environment"]
    index: Count
    ranks: tuple[Count, ...]


class Order(_Message, frozen=True):
    """Give a worker an order."""

    worker: Count
    order: dict[str, Any]


class Signal(_Message, frozen=True):
    """Send a worker a signal."""

    worker: Count
    number: Count


class AskStack(_Message, frozen=True):
    """What does a worker do just now?"""

    worker: Count
    stopped: bool


class AskReach(_Message, frozen=True):
    """Do connections to these places come about?"""

    number: Count
    addresses: Annotated[tuple[Text, ...], msgspec.Meta(max_length=64)]


class AskLink(_Message, frozen=True):
    """How fast is the way to a place (launch/links.py)?"""

    address: Text
    sends: bool
    """Whether to fill it; else how long a byte takes there and back."""


class AskPiece(_Message, frozen=True):
    """A part of a file, from `offset`; another host's agent asks, for what may be read there."""

    folder: Text
    file: Text
    offset: Count


class AskKept(_Message, frozen=True):
    """What saves of the run does this host's own disk have?"""

    number: Count


class Place(_Message, frozen=True):
    """Have the save of a commit, from this disk or another host's; nothing else counts then.

    Of a divided one without `sources`: only say what of it is `damaged` here.
    """

    number: Count
    run: Text
    commit: Commit | None
    """None: nothing was ever committed."""
    sources: tuple[Text, ...] = ()


class Copy(_Message, frozen=True):
    """Have what another host has saved of a step, as long as nobody counts it: a second copy."""

    number: Count
    step: Count
    generation: Count
    host: Count
    """Its number in that generation."""
    manifest: Text
    sources: tuple[Text, ...]


class Join(_Message, frozen=True):
    """Have whole saves of divided ones, one after the other, from wherever their parts are."""

    number: Count
    run: Text
    commits: tuple[Commit, ...]
    sources: tuple[Text, ...]


class Publish(_Message, frozen=True):
    """A commit was made: keep it in mind, and give this host's save its name."""

    number: Count
    run: Text
    commit: Commit
    keep: Count
    best: Count | None = None
    texts: dict[Text, str] = {}
    """Files of the run folder, so that a coordinator may go on from any host."""


class Bring(_Message, frozen=True):
    """Have a folder of the cache: its files, sizes and hashes, and who has them."""

    folder: Text
    files: dict[Text, Count]
    hashes: dict[Text, Text]
    sources: tuple[Text, ...]


class Alive(_Message, frozen=True):
    """Nothing but that the coordinator is there."""


class Bye(_Message, frozen=True):
    """The run has ended, with this exit status; None: only the question was asked."""

    status: Annotated[int, msgspec.Meta(ge=0, le=255)] | None = None


class Running(_Message, frozen=True):
    """A worker that runs at an agent already."""

    worker: Count
    rank: Count
    generation: Count = 0
    """The one that it was last told to join."""
    waiting: bool = False
    """For another generation."""
    done: bool = False


class Here(_Message, frozen=True):
    """An agent answers `Hello`: what its host is, and what stands in the way."""

    name: Text
    cores: Count
    memory_bytes: Count
    shoal: Text
    torch: Text
    code: Text
    busy: Text = ""
    """Whom it works for already."""
    missing: tuple[Text, ...] = ()
    """What it does not see of the run, in words."""
    running: tuple[Running, ...] = ()
    """What a coordinator that `adopts` goes on with."""
    lacks: tuple[Text, ...] = ()
    """Folders of the cache that it lacks, and can be given (`Bring`)."""
    disk: Text = ""
    """What its run folder is known by, where it is to be its own: the same on another host means
    that they share it."""
    open_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    """One that the system chose, as those of workers: others test whether they reach it."""


class Leaving(_Message, frozen=True):
    """The host is about to go: a scheduler has asked its agent to end."""


class Said(_Message, frozen=True):
    """A worker has said something, or has ended (`status`)."""

    worker: Count
    message: dict[str, Any] | None = None
    status: int | None = None


class Seen(_Message, frozen=True):
    """How the host's workers are; said every SIGN_SECONDS."""

    sightings: tuple[Sighting, ...] = ()
    pids: dict[Count, int] = {}
    memory_kills: Count = 0


class Stack(_Message, frozen=True):
    """The answer to `AskStack`."""

    worker: Count
    text: str


class Reached(_Message, frozen=True):
    """The answer to `AskReach`."""

    number: Count
    unreached: tuple[Text, ...] = ()


class Linked(_Message, frozen=True):
    """The answer to `AskLink`."""

    link: Measured


class Piece(_Message, frozen=True):
    """The answer to `AskPiece`."""

    offset: Count
    data: bytes = b""
    total: Count = 0
    """Bytes of the whole file."""
    problem: Text = ""


class Has(_Message, frozen=True):
    """The answer to `AskKept`."""

    number: Count
    kept: Kept


class Done(_Message, frozen=True):
    """`Place`, `Copy`, `Join`, `Publish` or `Bring` is done, or cannot be."""

    number: Count = 0
    folder: Text = ""
    num_bytes: Count = 0
    """Read from other hosts."""
    refused: tuple[Text, ...] = ()
    """Sources that were left, and why."""
    problem: Text = ""
    damaged: tuple[Text, ...] = ()
    """Manifests of a divided save whose files are not what they say."""


ToAgent = (
    Hello
    | Start
    | Order
    | Signal
    | AskStack
    | AskReach
    | AskLink
    | AskPiece
    | AskKept
    | Place
    | Copy
    | Join
    | Publish
    | Bring
    | Alive
    | Bye
)
ToCoordinator = Here | Leaving | Said | Seen | Stack | Reached | Linked | Has | Done


def folder_digest(folder: Path) -> str:
    """Of the files in a folder: names, sizes, and blocks of each; empty where there is none."""
    if not folder.is_dir():
        return ""
    total = xxhash.xxh3_64()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        total.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            for number in range(16):
                file.seek(max(0, size - 4096) * number // 15)
                total.update(file.read(4096))
    return total.hexdigest()
