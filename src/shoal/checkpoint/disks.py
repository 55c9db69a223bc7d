"""Saves on disks that hosts do not share: what was committed, who has it, what a run goes on from.

Each host's RUN/checkpoints has whole saves of its own, and `committed.json`: the commits that this
host was told of. A commit names manifests by their hashes; a folder whose manifest no commit names
does not count, however new it is, nor one whose files are not those of its manifest.
Where no host has all of a state, each saves its own boxes, and has a copy of another's: a divided
save, which is joined to a whole one where it is read. No torch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
import xxhash

from shoal.checkpoint.files import Files
from shoal.checkpoint.folders import (
    divided_name,
    divided_saves,
    drop,
    is_published,
    publish,
    published_name,
    published_steps,
    waiting_saves,
)
from shoal.checkpoint.folders import waiting_name as _waiting_name
from shoal.checkpoint.manifest import NAME, FileRecord, Manifest, Part, verify_file
from shoal.errors import CheckpointError, RunError

RECORD = "committed.json"
COPIES = 2
"""Hosts that have a save before it counts, unless there is only one: then any one may be lost."""
_MOST_COMMITS = 64
_HOSTS = "hosts"
"""In the state of a joined save: the manifests that it is of."""
Text = Annotated[str, msgspec.Meta(max_length=1 << 12)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class Commit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A save that counts. The later of two is the one with the larger `number`."""

    epoch: Count
    """Of the start that made it: one more than any start of the run that its hosts knew of."""
    count: Count
    """Within the epoch."""
    start: Text
    """Of that start alone: two of one epoch have gone on without knowing of one another."""
    step: Count
    manifests: tuple[Text, ...]
    """xxh3_128 of the manifest's bytes, of each host that has it."""
    hosts: tuple[Text, ...]
    """Who they were, for messages."""
    divided: Count = 0
    """The generation, where each manifest is of one host's boxes, in the order of its hosts, so
    that all of them are needed; 0: each is of all."""

    @property
    def number(self) -> tuple[int, int]:
        return self.epoch, self.count

    @property
    def names(self) -> set[str]:
        """What saves of it are known by, in `Kept`."""
        return {*self.manifests, *([_joined_hash(self.manifests)] if self.divided else [])}

    def folder(self, host: int) -> str:
        """Of what host number `host` has saved, where it is divided."""
        return divided_name(self.step, generation=self.divided, host=host)


class Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one host's disk has of a run."""

    run: Text = ""
    """Of which run the commits are; empty: it knows of none."""
    commits: tuple[Commit, ...] = ()
    saves: dict[Text, Text] = {}
    """Folder of each whole save, by the hash of its manifest."""


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    run: Text
    commits: tuple[Commit, ...]


# --- one disk


def kept_in(checkpoints: Path) -> Kept:
    """What is there: saves with a manifest that can be read and files of the sizes that it says."""
    record = _record(checkpoints)
    saves = {manifest_hash(folder): folder.name for folder in _folders(checkpoints)}
    return Kept(record.run, record.commits, {key: name for key, name in saves.items() if key})


def run_in(checkpoints: Path) -> str:
    """Of which run the commits there are; empty where there are none."""
    return _record(checkpoints).run


def manifest_hash(folder: Path) -> str:
    """Of the save in `folder`; empty where that is not whole, as far as sizes tell.

    A joined save is known by those that it is of.
    """
    try:
        manifest = Manifest.read(folder)
        sizes = {each.file: (folder / each.file).stat().st_size for each in manifest.part.files}
        content = (folder / NAME).read_bytes()
    except (CheckpointError, OSError):
        return ""
    if any(sizes[each.file] != each.num_bytes for each in manifest.part.files):
        return ""
    if joined := manifest.state.get(_HOSTS):
        return _joined_hash(joined) if isinstance(joined, list) else ""
    return xxhash.xxh3_128_hexdigest(content)


def note(checkpoints: Path, commit: Commit, *, run: str, files: Files) -> None:
    """Keep in mind that `commit` counts, and everything that this host knew before it.

    The commits that are not before it are of another history, and go. Raises OSError.
    """
    known = _record(checkpoints)
    before = [each for each in known.commits if known.run == run and each.number < commit.number]
    commits = (*before[-_MOST_COMMITS:], commit)
    content = msgspec.json.format(msgspec.json.encode(_Record(run, commits)), indent=1)
    files.make(checkpoints)
    beside = checkpoints / f".{RECORD}"
    beside.unlink(missing_ok=True)
    files.write(beside, [content])
    files.replace(beside, checkpoints / RECORD)


def take(checkpoints: Path, commit: Commit, *, keep: int, best: int | None, files: Files) -> bool:
    """Give this host's save of `commit` its name; whether it has one. Raises OSError."""
    name = kept_in(checkpoints).saves
    found = [name[each] for each in commit.manifests if each in name]
    if not found:
        return False
    if found[0] != published_name(commit.step):
        kept = [] if best is None else [best]
        known: dict[str, Any] = {"step": commit.step, "keep": keep, "kept": kept}
        publish(checkpoints, checkpoints / found[0], **known, files=files)
    return True


def thin(checkpoints: Path, commit: Commit, *, keep: int, best: int | None, files: Files) -> None:
    """Drop divided saves up to `commit` but those that count of its last `keep` and the best step.

    Raises OSError.
    """
    known = [each for each in _record(checkpoints).commits if each.number <= commit.number]
    stays = {name for each in known[-keep:] for name in each.names}
    joined = _published_saves(checkpoints) if commit.divided else []
    for step, name in divided_saves(checkpoints) + joined:
        if step <= commit.step and step != best and manifest_hash(checkpoints / name) not in stays:
            drop(checkpoints, name, files=files)


def join(checkpoints: Path, commit: Commit, *, files: Files) -> None:
    """Make a whole save of a divided one, all of which is here. Raises CheckpointError, OSError.

    The files of boxes are the same ones (hard links), where the disk knows such.
    """
    whole = checkpoints / published_name(commit.step)
    if manifest_hash(whole) == _joined_hash(commit.manifests) and not save_damage(whole):
        return
    making = checkpoints / f".{whole.name}.joining"
    for old in (making, whole):
        if old.exists():
            files.remove(old)
    files.make(making)
    found = [checkpoints / commit.folder(host) for host in range(len(commit.manifests))]
    manifests = [Manifest.read(folder, step=commit.step) for folder in found]
    for folder, manifest in zip(found, manifests):
        for each in manifest.part.files:
            _link(folder / each.file, making / each.file)
    part = Part.joined([each.part for each in manifests])
    state = {**manifests[0].state, _HOSTS: list(commit.manifests)}
    files.write(making / NAME, [Manifest(commit.step, part, state).to_bytes()])
    files.rename(making, whole)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # not on this kind of disk
        shutil.copyfile(source, target)


def _joined_hash(manifests: Sequence[str]) -> str:
    return xxhash.xxh3_128_hexdigest("\n".join(manifests).encode())


def settle(checkpoints: Path, commit: Commit | None, *, files: Files) -> None:
    """Drop the saves that have lost to `commit`: what no commit up to it names, and what follows.

    None: all of them. Raises OSError.
    """
    counted: set[str] = set()
    if commit is not None:
        earlier = [each for each in _record(checkpoints).commits if each.number < commit.number]
        counted = {name for each in (*earlier, commit) for name in each.names}
    for folder in _folders(checkpoints):
        if manifest_hash(folder) not in counted:
            drop(checkpoints, folder.name, files=files)
    for step, name in _published_saves(checkpoints) + divided_saves(checkpoints):
        if commit is not None and step > commit.step:
            drop(checkpoints, name, files=files)


def files_of(folder: Path) -> tuple[FileRecord, ...]:
    """What a save's manifest names. Raises CheckpointError."""
    return Manifest.read(folder).part.files


def save_damage(folder: Path) -> str | None:
    """What is wrong with a save's files by their hashes; None: nothing."""
    try:
        for each in files_of(folder):
            verify_file(folder / each.file, each)
    except CheckpointError as error:
        return str(error)
    return None


def _folders(checkpoints: Path) -> list[Path]:
    """Of saves, those that count and those that wait to."""
    saves = _published_saves(checkpoints) + divided_saves(checkpoints)
    names = [name for _, name in saves]
    waiting = waiting_saves(checkpoints)
    names += [_waiting_name(step, generation=number) for number, step in waiting]
    return [checkpoints / name for name in names]


def _published_saves(checkpoints: Path) -> list[tuple[int, str]]:
    """(step, name) of the checkpoints."""
    return [(step, published_name(step)) for step in published_steps(checkpoints)]


def _record(checkpoints: Path) -> _Record:
    with suppress(OSError, msgspec.DecodeError):  # a damaged one says nothing
        return msgspec.json.decode((checkpoints / RECORD).read_bytes(), type=_Record)
    return _Record("", ())


# --- all of them


def run_of(hosts: Mapping[str, Kept]) -> str:
    """Of which run the hosts have saves; empty: none has any. Raises RunError for several."""
    runs: dict[str, list[str]] = {}
    for name, kept in hosts.items():
        if kept.run:
            runs.setdefault(kept.run, []).append(name)
    if len(runs) > 1:
        found = "\n    ".join(f"{', '.join(names)}: run {run}" for run, names in runs.items())
        raise RunError(
            f"the disks of the hosts have saves of different runs in the same folder:\n    {found}"
            "\n    remove the folder where it is not of this run, or choose another --out"
        )
    return next(iter(runs), "")


def strangers(hosts: Mapping[str, Kept]) -> dict[str, list[str]]:
    """Checkpoints that no commit names, by host: somebody has gone on there alone."""
    commits = [each for kept in hosts.values() for each in kept.commits]
    known = {name for each in commits for name in each.names}
    found: dict[str, list[str]] = {}
    for name, kept in hosts.items():
        alone = [save for manifest, save in kept.saves.items() if manifest not in known]
        published = [save for save in alone if is_published(save)]
        if published:
            found[name] = published
    return found


def next_epoch(hosts: Mapping[str, Kept]) -> int:
    """Of a start that these hosts take part in."""
    return 1 + max((each.epoch for kept in hosts.values() for each in kept.commits), default=0)


def candidates(hosts: Mapping[str, Kept]) -> Iterator[tuple[Commit, list[str]]]:
    """Every commit that any host knows of, the newest first, and who has its save whole.

    Raises RunError where hosts have gone on separately, so that neither can be called the later.
    """
    known = {each.number: each for kept in hosts.values() for each in kept.commits}
    last = max(known, default=(0, 0))[0]
    starts: dict[str, list[str]] = {}
    for name, kept in hosts.items():
        for each in kept.commits:
            if each.epoch == last and name not in starts.setdefault(each.start, []):
                starts[each.start].append(name)
    if len(starts) > 1:
        sides = " and ".join(", ".join(names) for names in starts.values())
        raise RunError(
            f"{sides} have gone on with the run without each other, and saved different things\n"
            "    go on with one side only: leave the other's hosts out of --hosts, or remove their "
            "RUN/checkpoints"
        )
    for number in sorted(known, reverse=True):
        manifests: Sequence[str] = [
            name
            for kept in hosts.values()
            for each in kept.commits
            if each.number == number
            for name in each.manifests
        ]
        holders = [n for n, kept in hosts.items() if any(m in kept.saves for m in manifests)]
        found = tuple(dict.fromkeys(manifests))
        yield msgspec.structs.replace(known[number], manifests=found), holders
