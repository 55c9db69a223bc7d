"""Saves of a run whose hosts share no storage: the coordinator's side.

Each host saves whole on its own disk. A save counts once two hosts have it (or the only one), and
know that it does: then any one host may be lost. What counted last is looked for at every start,
on whatever hosts are there; those that lack it get it from those that have it.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.checkpoint.disks import COPIES, Commit, Kept, candidates, next_epoch, run_of, strangers
from shoal.errors import RunError
from shoal.launch import calls
from shoal.launch.directory import anything_to_resume
from shoal.launch.host_files import BEGINNING
from shoal.launch.remote_site import RemoteSite

Event = tuple[str, dict[str, Any]]
_ASK_SECONDS = 60.0
_END_SECONDS = 20.0


@dataclass
class _Save:
    """One save as hosts tell of it."""

    fields: Mapping[str, Any]
    manifests: dict[str, str] = field(default_factory=dict)
    """By the host that has it."""
    know: set[str] = field(default_factory=set)
    """Hosts that have it and know that it counts."""
    said: bool = False

    @property
    def order(self) -> tuple[int, int]:
        return self.fields["generation"], self.fields["step"]

    @property
    def needed(self) -> int:
        return min(COPIES, int(self.fields["disks"]))


class OwnDisks:
    """`place` before workers start, `kept` and `look` while they work, `close` at the end."""

    def __init__(
        self, sites: Sequence[RemoteSite], *, run: Path, say: Callable[[str], None]
    ) -> None:
        """`run`: the folder that the coordinator writes."""
        self._sites, self._folder, self._say = sites, run, say
        self._start = secrets.token_hex(8)
        self._numbers = itertools.count(1)
        self._run, self._epoch, self._count = "", 0, 0
        self._saves: dict[tuple[int, int, str], _Save] = {}
        self._last: _Save | None = None
        self._asked: dict[int, _Save] = {}
        self._events: list[Event] = []

    # --- before a start

    def place(self, *, begins: bool = False) -> bool:
        """Let all hosts that are there have the save that counts, and no other; whether there is
        one.

        `begins`: the run is a new one. Raises RunError for a disk that has another run's saves, for
        hosts that have gone on separately, and where no save is left of a run that had some.
        """
        there = self._there()
        kept = self._kept(there)
        run = run_of(kept)
        if run and self._run and run != self._run:
            raise RunError(f"the disks of the hosts have saves of another run ({run}) by now")
        if run and begins:
            who = ", ".join(name for name, each in kept.items() if each.run)
            raise RunError(
                f"{who}: the disk has saves of a run in this folder already; go on with it by "
                "--go-on, on a host that has its config.yaml, or choose another --out"
            )
        _refuse_strangers(kept)
        self._run = self._run or run or secrets.token_hex(8)
        self._epoch, self._count = max(self._epoch, next_epoch(kept)), 0
        self._saves, self._last, self._asked = {}, None, {}
        for commit, holders in candidates(kept):
            if self._placed(commit, there, holders=holders):
                return True
        if any(each.commits for each in kept.values()):
            last = [commit for commit, _ in candidates(kept)][:3]
            were = "".join(f"\n    step {c.step} was on {', '.join(c.hosts)}" for c in last)
            raise RunError(
                f"no host that is there has a save whole any more{were}\n    bring one of those "
                "hosts back, or begin anew with another --out"
            )
        if not begins and anything_to_resume(self._folder, say=self._say):
            raise RunError(
                f"{self._folder}: something was saved, and no host that is there has any of it\n"
                "    bring the hosts back that had it, or begin anew with another --out"
            )
        self._ordered(there, lambda site: (None, ()))
        return False

    def _placed(self, commit: Commit, there: Sequence[RemoteSite], *, holders: list[str]) -> bool:
        """Whether all have the save of `commit` now; says why not."""
        have = [site for site in there if site.name in holders]
        wrong = self._ordered(have, lambda site: (commit, ()))
        whole = [site for site in have if site.name not in wrong]
        if not whole:
            why = f" ({'; '.join(wrong.values())})" if wrong else ""
            where = f"the save of step {commit.step} was on {', '.join(commit.hosts)}"
            text = (
                f"{where}; nobody who is there has it whole{why}, so going back to the one before"
            )
            self._events.append(("save-lost", {"step": commit.step, "text": text}))
            return False
        sources = tuple(site.address for site in whole)
        others = [site for site in there if site not in whole]
        wrong = self._ordered(others, lambda site: (commit, sources))
        if wrong:
            text = "\n    ".join(f"{name}: {problem}" for name, problem in wrong.items())
            raise RunError(f"hosts cannot be given the save of step {commit.step}:\n    {text}")
        if others:
            names = ", ".join(site.name for site in others)
            given = ", ".join(site.name for site in whole)
            text = f"the save of step {commit.step} was handed on to {names} by {given}"
            self._events.append(("save-handed-on", {"step": commit.step, "text": text}))
        return True

    def _ordered(
        self,
        sites: Sequence[RemoteSite],
        what: Callable[[RemoteSite], tuple[Commit | None, tuple[str, ...]]],
    ) -> dict[str, str]:
        """Give orders to place, and wait; what is wrong, by host."""
        number = next(self._numbers)
        for site in sites:
            commit, sources = what(site)
            site.tell(calls.Place(number=number, run=self._run, commit=commit, sources=sources))
        found = self._answers(sites, number=number, patience_seconds=None)
        wrong = {
            s.name: f"{s.name} {s.gone or 'gave no answer'}" for s in sites if s.name not in found
        }
        for name, answer in found.items():
            assert isinstance(answer, calls.Done), "as it was asked"
            if answer.problem:
                wrong[name] = answer.problem
        return wrong

    def _kept(self, there: Sequence[RemoteSite]) -> dict[str, Kept]:
        number = next(self._numbers)
        for site in there:
            site.tell(calls.AskKept(number=number))
        found = self._answers(there, number=number, patience_seconds=_ASK_SECONDS)
        silent = [site.name for site in there if site.name not in found]
        if silent:
            raise RunError(f"{', '.join(silent)}: did not say what saves there are")
        return {name: has.kept for name, has in found.items() if isinstance(has, calls.Has)}

    def _answers(
        self, sites: Sequence[RemoteSite], *, number: int, patience_seconds: float | None
    ) -> dict[str, calls.Has | calls.Done]:
        """By the name of the host; hosts that go meanwhile give none."""
        found: dict[str, calls.Has | calls.Done] = {}
        began = time.monotonic()
        while any(site.name not in found and site.gone is None for site in sites):
            for site in self._sites:
                for _ in site.events(timeout_seconds=0.05 / len(self._sites)):
                    pass
                while site.answers:
                    answer = site.answers.popleft()
                    if answer.number == number:
                        found[site.name] = answer
            if patience_seconds is not None and time.monotonic() - began > patience_seconds:
                break
        return found

    def _there(self) -> list[RemoteSite]:
        return [site for site in self._sites if site.gone is None]

    # --- while workers work

    def kept(self, host: str, fields: Mapping[str, Any]) -> None:
        """A host has a save whole, as its first worker says."""
        key = (fields["generation"], fields["step"], fields["token"])
        save = self._saves.setdefault(key, _Save(fields))
        save.manifests[host] = fields["manifest"]
        late = self._last is not None and save is not self._last and save.order <= self._last.order
        if late or len(save.manifests) < save.needed:
            return
        if save is not self._last:
            self._count, self._last = self._count + 1, save
            self._saves = {key: save}
        self._tell(save)

    def _tell(self, save: _Save) -> None:
        """Tell all hosts that it counts."""
        commit = Commit(
            epoch=self._epoch,
            count=self._count,
            start=self._start,
            step=save.fields["step"],
            manifests=tuple(dict.fromkeys(save.manifests.values())),
            hosts=tuple(save.manifests),
        )
        number, known = next(self._numbers), save.fields
        self._asked[number] = save
        files = [path for path in map(self._folder.joinpath, BEGINNING) if path.is_file()]
        texts = {path.name: path.read_text(encoding="utf-8") for path in files}
        more = {"keep": known["keep"], "best": known["best"], "texts": texts}
        for site in self._there():
            site.tell(calls.Publish(number=number, run=self._run, commit=commit, **more))

    def look(self) -> list[Event]:
        """What has happened since the last call."""
        for site in self._sites:
            while site.answers:
                answer = site.answers.popleft()
                save = self._asked.get(answer.number)
                if save is None or not isinstance(answer, calls.Done):
                    continue
                if answer.problem:
                    text = f"{site.name}: step {save.fields['step']}: {answer.problem}"
                    self._events.append(
                        ("save-failed", {"step": save.fields["step"], "text": text})
                    )
                elif site.name in save.manifests:
                    save.know.add(site.name)
                if len(save.know) >= save.needed and not save.said:
                    save.said = True
                    self._events.append(("saved", self._saved(save)))
        events, self._events = self._events, []
        return events

    def _saved(self, save: _Save) -> dict[str, Any]:
        names = ("step", "seconds", "stall_seconds")
        known = {name: save.fields[name] for name in names}
        return {**known, "at": f"step-{known['step']:08d}", "hosts": sorted(save.manifests)}

    def close(self) -> list[Event]:
        """Wait for the last save to count; what has happened."""
        events, deadline = self.look(), time.monotonic() + _END_SECONDS
        while self._last is not None and not self._last.said and time.monotonic() < deadline:
            for site in self._sites:
                for _ in site.events(timeout_seconds=0.05 / len(self._sites)):
                    pass
            events += self.look()
        return events


def _refuse_strangers(kept: Mapping[str, Kept]) -> None:
    """Raises RunError for checkpoints that no commit names: they would be dropped unseen."""
    found = strangers(kept)
    if found:
        named = "\n    ".join(f"{name}: {', '.join(saves)}" for name, saves in found.items())
        raise RunError(
            f"hosts have checkpoints that were saved without the others:\n    {named}\n"
            "    go on from them there by shoal resume, or remove these folders"
        )
