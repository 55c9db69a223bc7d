"""The checkpoints of one run in an object store: no renames, so the manifest is the publication.

    URL/start-00000002.json                              who goes on with the run
    URL/start-00000002.saves.json                        and what counted by then
    URL/step-00000100.s2/rank-00000.TOKEN.safetensors    a part; of each attempt under its own name
    URL/step-00000100.s2/manifest.json                   last, and created only if it is not there

Whoever begins or goes on creates the next start, of which several who try get one; from then on an
older start publishes and removes nothing. Only then it looks at what is there, and names the saves
that count. A save counts if it is of the newest start that has said so, or if that names it; so
what an older one still had under way counts no more, however whole it is, and of two writers of one
step in one start one creates the manifest. Reading brings a save to the local
cache, verifies every byte there, and is the reading of any checkpoint.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import xxhash

from shoal.checkpoint.folders import published_name
from shoal.checkpoint.manifest import LARGEST_BYTES, NAME, Manifest, Part, verify_file
from shoal.checkpoint.objects import Objects, StoreError
from shoal.checkpoint.store import Reader, Store
from shoal.environment import cache_directory
from shoal.errors import CheckpointError, RunError

_START = re.compile(r"start-(\d{8,})(\.saves)?\.json")
_OBJECT = re.compile(r"step-(\d{8,})\.s(\d+)/([^/]+)")
_UNUSED_SECONDS = 3600.0
"""After this a save that was brought here goes when another one is brought."""
Text = Annotated[str, msgspec.Meta(max_length=1 << 10)]


class Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Somebody has begun, or gone on with, the run."""

    number: Annotated[int, msgspec.Meta(ge=0)] = 0
    by: Text = ""
    """For messages."""
    saves: Annotated[tuple[Text, ...], msgspec.Meta(max_length=1 << 12)] = ()
    """Names of what counts of the starts before it; it goes on from the last one."""


@dataclass(frozen=True, order=True)
class Save:
    """A save by its place; of one step the one of the later start is the larger."""

    step: int
    start: int

    @property
    def name(self) -> str:
        return f"{published_name(self.step)}.s{self.start}"


@dataclass(frozen=True)
class Listed:
    """What is there at one time."""

    last: int
    """Number of the newest start: nobody else publishes or removes anything."""
    start: Start
    """The newest one that has said what counts."""
    objects: Mapping[Save, Mapping[str, int]]
    """Of each save, whole or not: its objects with their bytes."""

    @property
    def counted(self) -> list[Save]:
        """The saves that count, as far as there is a manifest, in the order of their steps."""
        of = self.start
        return sorted(
            save
            for save, found in self.objects.items()
            if NAME in found and (save.start == of.number or save.name in of.saves)
        )


class ObjectStore(Store):
    """As `Store`, in a store of objects."""

    look_seconds = 0.5
    away_seconds = 120.0

    def __init__(self, objects: Objects, *, start: int = 0) -> None:
        """`start`: the number of the start whose saves these are, for who writes."""
        key = xxhash.xxh3_64_hexdigest(objects.url.encode())
        super().__init__(cache_directory() / "saves" / key)
        self.objects, self.start = objects, start
        if not objects.is_folder:  # it may not answer for long, and training waits
            self.patience_seconds = 10.0

    @property
    def place(self) -> str:
        return self.objects.url

    # --- who counts

    def listed(self) -> Listed:
        """What is there. Raises StoreError."""
        last, said, found = 0, 0, dict[Save, dict[str, int]]()
        for name, size in self.objects.sizes().items():
            if match := _START.fullmatch(name):
                last = max(last, int(match[1]))
                said = max(said, int(match[1])) if match[2] else said
            elif match := _OBJECT.fullmatch(name):
                found.setdefault(Save(int(match[1]), int(match[2])), {})[match[3]] = size
        return Listed(last, self._start(said, ".saves") if said else Start(), found)

    def _start(self, number: int, more: str = "") -> Start:
        name = f"start-{number:08d}{more}.json"
        try:
            return msgspec.json.decode(self.objects.read(name), type=Start)
        except FileNotFoundError:
            raise StoreError(f"{self.place}/{name}: is gone") from None
        except msgspec.DecodeError as error:
            raise StoreError(f"{self.place}/{name}: cannot be understood: {error}") from None

    def claim(self, *, by: str, begins: bool, on_bad: Callable[[str], None]) -> int | None:
        """Begin, or go on: from now on no older start's saves count but those that do by now.

        Returns the step to go on from; None: nothing counts. `by`: who it is. `on_bad`: told of
        saves that are passed over. Raises RunError where the store has a run's saves and this one
        `begins`, and for who comes second; StoreError.
        """
        listed = self.listed()
        if begins and listed.counted:
            raise RunError(
                f"{self.place}: has saves of a run already (to step {listed.counted[-1].step}); go "
                "on with it by --go-on, or choose another checkpoint.where"
            )
        number = listed.last + 1
        self._create_start(Start(number, by))
        listed = self.listed()  # now that nobody else changes it
        counted = listed.counted
        while counted and (problem := self._incomplete(counted[-1], listed)) is not None:
            on_bad(problem)
            counted.pop()
        self._create_start(Start(number, by, tuple(save.name for save in counted)), ".saves")
        self.start = number
        return counted[-1].step if counted else None

    def _create_start(self, start: Start, more: str = "") -> None:
        """Raises RunError where another has it."""
        try:
            self.objects.create(f"start-{start.number:08d}{more}.json", msgspec.json.encode(start))
        except FileExistsError:
            raise RunError(
                f"{self.place}: {self._start(start.number).by} has begun at the same moment, and "
                "writes there now\n    choose another checkpoint.where, or end one of the two"
            ) from None

    def _incomplete(self, save: Save, listed: Listed) -> str | None:
        """What a save lacks, by the sizes of its objects; None: nothing."""
        try:
            manifest = self._manifest(save)[0]
        except CheckpointError as error:
            return str(error)
        for each in manifest.part.files:
            size = listed.objects[save].get(each.file)
            if size != each.num_bytes:
                got = "nothing" if size is None else f"{size} bytes"
                where = f"{self.place}/{save.name}/{each.file}"
                return f"{where}: expected {each.num_bytes} bytes, got {got}"
        return None

    # --- writing

    def prepare(self, step: int, *, rank: int, token: str, generation: int) -> None:
        return  # objects need no folder, and what is left over goes with the next save that counts

    def _part_name(self, rank: int, *, token: str) -> str:
        return f"rank-{rank:05d}.{token}.safetensors"

    def _own(self, step: int, name: str) -> str:
        return f"{Save(step, self.start).name}/{name}"

    def _write(
        self, step: int, name: str, content: Iterable[bytes | memoryview], *, token: str
    ) -> tuple[int, str]:
        return self.objects.write(self._own(step, name), content)

    def publish(
        self,
        step: int,
        *,
        parts: list[Part],
        state: dict[str, Any],
        keep: int,
        token: str = "",
        generation: int = 0,
        host: int | None = None,
    ) -> Path:
        whole = Part.joined(parts)
        save, listed = Save(step, self.start), self.listed()
        if listed.last != self.start:
            raise StoreError(
                f"{self._start(listed.last).by} goes on with the run in {self.place} by now, and "
                "what this start saves does not count any more"
            )
        there = listed.objects.get(save, {})
        for each in whole.files:
            if there.get(each.file) != each.num_bytes:
                raise StoreError(f"{self.place}/{save.name}/{each.file}: is not whole there")
        self._create_manifest(save, Manifest(step, whole, state).to_bytes())
        with suppress(OSError):  # the next one does it
            self.clean(step, keep=keep)
        return self.folder / save.name

    def _create_manifest(self, save: Save, content: bytes) -> None:
        """The publication. Raises StoreError where it is somebody else's."""
        name = f"{save.name}/{NAME}"
        try:
            self.objects.create(name, content)
        except OSError as error:
            with suppress(OSError):  # the answer may have been lost, and not the object
                if self.objects.read(name, most=LARGEST_BYTES) == content:
                    return
            if isinstance(error, FileExistsError):
                text = f"{self.place}/{name}: another writer has saved this step"
                raise StoreError(text) from None
            raise

    def clean(self, step: int, *, keep: int) -> None:
        """Remove all but the newest `keep` saves and the best one, and what never came to count.

        `step`: the one saved last; nobody writes an earlier one any more. Raises StoreError.
        """
        listed = self.listed()
        if listed.last != self.start:
            return  # it is another's to clean
        counted = listed.counted
        kept = {*counted[-keep:], *(save for save in counted if save.step == self.best)}
        for save, found in listed.objects.items():
            if save.start > self.start or (save.start == self.start and save.step > step):
                continue
            names = set(found)
            if save in kept:
                if save.step != step:
                    continue
                part = self._manifest(save)[0].part
                names -= {NAME, *(each.file for each in part.files)}
            ordered = sorted(names, key=lambda name: name != NAME)  # what counted does no more
            self.objects.remove(f"{save.name}/{name}" for name in ordered)

    def abandon(self, step: int, *, token: str) -> None:
        save = Save(step, self.start)
        own = [name for name in self.listed().objects.get(save, {}) if f".{token}." in name]
        self.objects.remove(f"{save.name}/{name}" for name in own)

    def put_report(self, step: int, content: bytes, *, rank: int, token: str) -> None:
        if content:
            self.objects.write(self._own(step, f"rank-{rank:05d}.{token}.report"), [content])

    def report(self, step: int, *, rank: int, token: str) -> bytes | None:
        try:
            return self.objects.read(self._own(step, f"rank-{rank:05d}.{token}.report"))
        except FileNotFoundError:
            return None

    def drop_reports(self, step: int, *, ranks: Iterable[int], token: str) -> None:
        return  # `clean` removes them, once they are not needed to try again

    def size(self, step: int, file: str, *, token: str) -> int | None:
        return None  # `publish` looks at all of them

    # --- reading

    def steps(self) -> list[int]:
        return sorted({save.step for save in self.listed().counted})

    def wait_for(self, step: int) -> None:
        return  # it has its name from the beginning

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of `step` on this host, brought here. CheckpointError."""
        return self._brought(self._found(step))

    def verify(self, step: int) -> Manifest:
        folder = self.path(step)
        for record in (manifest := Manifest.read(folder, step=step)).part.files:
            verify_file(folder / record.file, record)
        return manifest

    def newest_good(self, *, on_bad: Callable[[int, str], None]) -> int:
        with _answering():  # else an older save would be taken, and the newer one lost
            return super().newest_good(on_bad=on_bad)

    def open(self, step: int) -> Reader:
        with _answering():
            folder = self.path(step)
            return Reader(folder, Manifest.read(folder, step=step))

    def newest_manifest(self) -> Manifest | None:
        """Of the newest save that counts and can be read; only that file is brought here."""
        for save in reversed(self.listed().counted):
            with suppress(CheckpointError):
                return self._manifest(save)[0]
        return None

    def _found(self, step: int) -> Save:
        found = [save for save in self.listed().counted if save.step == step]
        if not found:
            raise CheckpointError(f"{self.place}: no save of step {step} counts there")
        return found[-1]

    def _manifest(self, save: Save) -> tuple[Manifest, bytes]:
        """Checked as any manifest is. Raises CheckpointError, StoreError."""
        where = f"{self.place}/{save.name}/{NAME}"
        try:
            content = self.objects.read(f"{save.name}/{NAME}", most=LARGEST_BYTES + 1)
        except FileNotFoundError:
            raise CheckpointError(f"{where}: is gone") from None
        return Manifest.of(content, at=where, step=save.step), content

    def _brought(self, save: Save) -> Path:
        manifest, content = self._manifest(save)
        folder = self.folder / f"{save.name}.{xxhash.xxh3_64_hexdigest(content)}"
        with self._alone():
            if not folder.is_dir():
                self._forget()
                self._bring(save, manifest, content, into=folder)
            os.utime(folder)
        return folder

    def _bring(self, save: Save, manifest: Manifest, content: bytes, *, into: Path) -> None:
        """All of it or nothing, and checked. Raises CheckpointError for other bytes."""
        beside = into.with_name(f".{into.name}.{secrets.token_hex(4)}")
        total, before = sum(each.num_bytes for each in manifest.part.files) or 1, 0

        def tell(done: int) -> None:
            self.tell((before + done) / total)

        try:
            beside.mkdir()
            for each in manifest.part.files:
                name, path = f"{save.name}/{each.file}", beside / each.file
                try:
                    self.objects.bring(name, path, most=each.num_bytes, tell=tell)
                    verify_file(path, each)
                except FileNotFoundError:
                    raise CheckpointError(f"{self.place}/{name}: is gone") from None
                except CheckpointError as error:
                    reason = str(error).removeprefix(f"{path}: ")
                    raise CheckpointError(f"{self.place}/{name}: {reason}") from None
                before += each.num_bytes
            (beside / NAME).write_bytes(content)
            beside.rename(into)
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Of the workers of a host one brings a save, and the others wait for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    self.tell(0.0)
                    time.sleep(0.1)
            yield

    def _forget(self) -> None:
        """Remove what was brought here before and nobody has asked for lately."""
        for each in self.folder.iterdir():
            with suppress(OSError):
                if each.is_dir() and time.time() - each.stat().st_mtime > _UNUSED_SECONDS:
                    shutil.rmtree(each)


@contextmanager
def _answering() -> Iterator[None]:
    """For who reads, a store that does not answer is no damage. Raises RunError for it."""
    try:
        yield
    except StoreError as error:
        raise RunError(str(error)) from None
