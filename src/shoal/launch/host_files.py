"""What an agent does with files of its host for a run: saves on its own disk, folders of its cache.

One thing after the other, in a thread, so that the agent goes on giving signs. No torch.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shoal.checkpoint.disks import (
    Commit,
    join,
    kept_in,
    note,
    run_in,
    save_damage,
    settle,
    take,
    thin,
)
from shoal.checkpoint.files import Files
from shoal.checkpoint.folders import (
    divided_name,
    drop,
    published_name,
    waiting_name,
    waiting_saves,
)
from shoal.comm.keys import Keys
from shoal.errors import CheckpointError, FetchError
from shoal.launch import calls
from shoal.launch.directory import DISK, write_whole
from shoal.launch.peers import Brought, bring_folder, bring_save, is_cached

Task = calls.AskKept | calls.Place | calls.Copy | calls.Join | calls.Publish | calls.Bring

BEGINNING = ("config.yaml", "plan.json")
"""Files of a run that every host has, so that its coordinator may be on any of them."""


def disk_of(run: Path) -> str:
    """What the run folder of this host is known by; made where it is not there. Raises OSError."""
    run.mkdir(parents=True, exist_ok=True)
    mark = run / DISK
    try:
        with mark.open("x", encoding="utf-8") as file:
            file.write(secrets.token_hex(8))
    except FileExistsError:
        pass
    return mark.read_text(encoding="utf-8")


class HostFiles:
    """`answers`: what is to be said to the coordinator."""

    def __init__(self, keys: Keys) -> None:
        self.answers: deque[calls.Has | calls.Done] = deque()
        self._keys, self._files = keys, Files()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="files")

    def follow(self, task: Task, *, run: Path) -> None:
        """Do it, and answer."""
        self._thread.submit(self._do, task, run / "checkpoints")

    def close(self) -> None:
        """Finish what is under way."""
        self._thread.shutdown(wait=True)

    def _do(self, task: Task, checkpoints: Path) -> None:
        if isinstance(task, calls.AskKept):
            self.answers.append(calls.Has(number=task.number, kept=kept_in(checkpoints)))
        elif isinstance(task, calls.Publish):
            self._done(lambda: self._publish(task, checkpoints), number=task.number)
        elif isinstance(task, calls.Place):
            self._done(lambda: self._place(task, checkpoints), number=task.number)
        elif isinstance(task, calls.Copy):
            self._done(lambda: self._copy(task, checkpoints), number=task.number)
        elif isinstance(task, calls.Join):
            self._done(lambda: self._join(task, checkpoints), number=task.number)
        else:
            self._done(lambda: self._bring(task), folder=task.folder)

    def _done(self, call: Callable[[], Brought], *, number: int = 0, folder: str = "") -> None:
        brought, problem = Brought(), ""
        try:
            brought = call()
        except (FetchError, CheckpointError) as error:
            problem = str(error)
        except OSError as error:
            problem = f"{error.filename or 'the disk'}: {error.strerror or error}"
        except Exception as error:  # a thread's error would be nobody's
            problem = f"{type(error).__name__}: {error}"
        self.answers.append(
            calls.Done(
                number=number,
                folder=folder,
                num_bytes=brought.num_bytes,
                refused=tuple(text[:1000] for text in brought.refused),
                problem=problem[:4000],
                damaged=tuple(brought.damaged),
            )
        )

    def _publish(self, task: calls.Publish, checkpoints: Path) -> Brought:
        _check_run(checkpoints, task.run)
        note(checkpoints, task.commit, run=task.run, files=self._files)
        for name in BEGINNING:
            path, text = checkpoints.parent / name, task.texts.get(name)
            if text is not None and not (path.is_file() and path.read_text("utf-8") == text):
                write_whole(path, text)
        keep, best = task.keep, task.best
        if not task.commit.divided:
            take(checkpoints, task.commit, keep=keep, best=best, files=self._files)
        thin(checkpoints, task.commit, keep=keep, best=best, files=self._files)
        for generation, step in waiting_saves(checkpoints):
            if step <= task.commit.step:  # another one counts by now
                drop(checkpoints, waiting_name(step, generation=generation), files=self._files)
        return Brought()

    def _place(self, task: calls.Place, checkpoints: Path) -> Brought:
        brought, commit = Brought(), task.commit
        _check_run(checkpoints, task.run)
        if commit is not None and commit.divided:
            return self._place_divided(commit, checkpoints, task=task)
        if commit is not None:
            folder = checkpoints / published_name(commit.step)
            checkpoints.mkdir(parents=True, exist_ok=True)
            note(checkpoints, commit, run=task.run, files=self._files)  # else it is a stranger's
            take(checkpoints, commit, keep=1 << 30, best=None, files=self._files)
            if not task.sources and (problem := save_damage(folder)) is not None:
                raise FetchError(problem)
            known = {"manifests": commit.manifests, "sources": task.sources}
            brought = bring_save(folder, **known, keys=self._keys)
            self._files.flush(checkpoints)
        settle(checkpoints, commit, files=self._files)
        return brought

    def _place_divided(self, commit: Commit, checkpoints: Path, *, task: calls.Place) -> Brought:
        if task.sources:
            note(checkpoints, commit, run=task.run, files=self._files)
            brought = self._joined(commit, checkpoints, sources=task.sources)
            settle(checkpoints, commit, files=self._files)
            return brought
        here = kept_in(checkpoints).saves
        return Brought(
            damaged=[
                manifest
                for manifest in commit.manifests
                if manifest in here and save_damage(checkpoints / here[manifest]) is not None
            ]
        )

    def _joined(self, commit: Commit, checkpoints: Path, *, sources: Sequence[str]) -> Brought:
        """Have all of a divided save here, and whole."""
        brought = Brought()
        self._files.make(checkpoints)
        for host, manifest in enumerate(commit.manifests):
            folder = checkpoints / commit.folder(host)
            known = {"manifests": [manifest], "sources": sources}
            brought.add(bring_save(folder, **known, keys=self._keys))
        join(checkpoints, commit, files=self._files)
        return brought

    def _copy(self, task: calls.Copy, checkpoints: Path) -> Brought:
        name = divided_name(task.step, generation=task.generation, host=task.host)
        known = {"manifests": [task.manifest], "sources": task.sources}
        brought = bring_save(checkpoints / name, **known, keys=self._keys)
        self._files.flush(checkpoints)
        return brought

    def _join(self, task: calls.Join, checkpoints: Path) -> Brought:
        brought = Brought()
        _check_run(checkpoints, task.run)
        for commit in task.commits:
            brought.add(self._joined(commit, checkpoints, sources=task.sources))
        return brought

    def _bring(self, task: calls.Bring) -> Brought:
        folder = Path(task.folder)
        if not is_cached(folder):
            raise FetchError(f"{folder}: is not in this host's cache (SHOAL_CACHE)")
        contents = {"files": dict(task.files), "hashes": dict(task.hashes)}
        return bring_folder(folder, contents, sources=task.sources, keys=self._keys)


def _check_run(checkpoints: Path, run: str) -> None:
    """Raises FetchError for a disk whose saves are another run's: nothing of them is touched."""
    here = run_in(checkpoints)
    if here not in ("", run):
        raise FetchError(f"{checkpoints}: has saves of another run ({here}); remove them there")
