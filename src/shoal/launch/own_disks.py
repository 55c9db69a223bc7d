"""Saves of a run whose hosts share no storage: the coordinator's side.

Each host saves whole on its own disk. A save counts once two hosts have it (or the only one), and
know that it does: then any one host may be lost. What counted last is looked for at every start,
on whatever hosts are there; those that lack it get it from those that have it.
Where no host has all of a state, each saves its own boxes, and the next one gets a copy of them
before the save counts: again any one host may be lost. A start then joins them on every host.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from shoal.checkpoint.disks import COPIES, Commit, Kept, candidates, next_epoch, run_of, strangers
from shoal.errors import RunError
from shoal.launch import calls
from shoal.launch.directory import anything_to_resume
from shoal.launch.host_files import BEGINNING
from shoal.launch.remote_site import RemoteSite

Event = tuple[str, dict[str, Any]]
_ASK_SECONDS = 60.0
_END_SECONDS = 20.0
_REMEMBERED = 64
_COPY_SECONDS = 600.0
"""For the copies of the last save."""


@dataclass
class _Save:
    """One save as hosts tell of it."""

    fields: Mapping[str, Any]
    manifests: dict[str, str] = field(default_factory=dict)
    """By the host that has it."""
    numbers: dict[int, str] = field(default_factory=dict)
    """Hosts by their number in the generation, where the save is divided."""
    copied: set[str] = field(default_factory=set)
    """Hosts that have a copy of another's boxes."""
    know: set[str] = field(default_factory=set)
    """Hosts that have it and know that it counts."""
    said: bool = False

    @property
    def order(self) -> tuple[int, int]:
        return self.fields["generation"], self.fields["step"]

    @property
    def needed(self) -> int:
        return min(COPIES, int(self.fields["disks"]))

    @property
    def is_divided(self) -> bool:
        return self.fields["host"] is not None

    @property
    def in_order(self) -> dict[str, str]:
        """The manifests of a divided one, by host, in the order of its hosts."""
        return {host: self.manifests[host] for _, host in sorted(self.numbers.items())}


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
        self._copies: dict[int, tuple[_Save, RemoteSite]] = {}
        """Orders to copy that are not answered yet."""
        self._counted: list[Commit] = []
        """Of this run, by any start, the newest last: the best one, and the last ones."""
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
        self._saves, self._last, self._asked, self._copies = {}, None, {}, {}
        found = list(candidates(kept))
        for number, (commit, holders) in enumerate(found):
            have = [site for site in there if site.name in holders]
            if commit.divided:
                is_placed = self._placed_divided(commit, there, have=have, kept=kept)
            else:
                is_placed = self._placed(commit, there, have=have)
            if is_placed:
                self._counted = [each for each, _ in reversed(found[number:])]
                return True
        if any(each.commits for each in kept.values()):
            last = [commit for commit, _ in found][:3]
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
        self._ordered(there, None)
        return False

    def _placed(
        self, commit: Commit, there: Sequence[RemoteSite], *, have: list[RemoteSite]
    ) -> bool:
        """Whether all have the save of `commit` now; says why not."""
        wrong = self._ordered(have, commit)
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
        self._given(self._ordered(others, commit, sources=sources), step=commit.step)
        if others:
            names = ", ".join(site.name for site in others)
            given = ", ".join(site.name for site in whole)
            text = f"the save of step {commit.step} was handed on to {names} by {given}"
            self._events.append(("save-handed-on", {"step": commit.step, "text": text}))
        return True

    def _placed_divided(
        self,
        commit: Commit,
        there: Sequence[RemoteSite],
        *,
        have: list[RemoteSite],
        kept: Mapping[str, Kept],
    ) -> bool:
        """Whether all have the divided save of `commit` joined now; says why not."""
        done = self._done(have, calls.Place(number=0, run=self._run, commit=commit))
        sound = {
            manifest
            for name, answer in done.items()
            for manifest in kept[name].saves
            if not answer.problem and manifest not in answer.damaged
        }
        lost = [h for h, manifest in zip(commit.hosts, commit.manifests) if manifest not in sound]
        if lost:
            text = (
                f"of the save of step {commit.step} nobody who is there has what "
                f"{', '.join(lost)} had, whole, so going back to the one before"
            )
            self._events.append(("save-lost", {"step": commit.step, "text": text}))
            return False
        sources = tuple(site.address for site in have)
        self._given(self._ordered(there, commit, sources=sources), step=commit.step)
        return True

    def _given(self, wrong: Mapping[str, str], *, step: int) -> None:
        """Raises RunError where hosts could not be given a save."""
        if wrong:
            text = "\n    ".join(f"{name}: {problem}" for name, problem in wrong.items())
            raise RunError(f"hosts cannot be given the save of step {step}:\n    {text}")

    def _ordered(
        self, sites: Sequence[RemoteSite], commit: Commit | None, *, sources: tuple[str, ...] = ()
    ) -> dict[str, str]:
        """Order to place, and wait; what is wrong, by host."""
        order = calls.Place(number=0, run=self._run, commit=commit, sources=sources)
        done = self._done(sites, order)
        wrong = {
            s.name: f"{s.name} {s.gone or 'gave no answer'}" for s in sites if s.name not in done
        }
        return wrong | {name: each.problem for name, each in done.items() if each.problem}

    def _done(self, sites: Sequence[RemoteSite], order: calls.Place) -> dict[str, calls.Done]:
        """Give an order, and wait; the answers, by host."""
        number = next(self._numbers)
        for site in sites:
            site.tell(msgspec.structs.replace(order, number=number))
        found = self._answers(sites, number=number, patience_seconds=None)
        return {name: each for name, each in found.items() if isinstance(each, calls.Done)}

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
        if save.is_divided:
            self._divided(host, save, number=int(fields["host"]))
        elif len(save.manifests) >= save.needed:
            self._count_it(save)

    def _divided(self, host: str, save: _Save, *, number: int) -> None:
        """Host `number` has saved its boxes: once all have, each gets a copy of another's."""
        save.numbers[number] = host
        if len(save.numbers) < save.fields["disks"]:
            return
        hosts = list(save.in_order)
        sites = {site.name: site for site in self._sites}
        if len(hosts) == 1:
            self._count_it(save)
            return
        for at, source in enumerate(hosts):
            asked, next_one = next(self._numbers), sites[hosts[(at + 1) % len(hosts)]]
            self._copies[asked] = save, next_one
            next_one.tell(
                calls.Copy(
                    number=asked,
                    step=save.fields["step"],
                    generation=save.fields["generation"],
                    host=at,
                    manifest=save.manifests[source],
                    sources=(sites[source].address,),
                )
            )

    def _count_it(self, save: _Save) -> None:
        """Unless a later one counts already."""
        last = self._last
        if last is not None and save is not last and save.order <= last.order:
            return
        if save is not last:
            self._count, self._last = self._count + 1, save
            kept = {key: each for key, each in self._saves.items() if each.order >= save.order}
            self._saves = kept
        self._tell(save)

    def _tell(self, save: _Save) -> None:
        """Tell all hosts that it counts."""
        manifests = save.in_order if save.is_divided else save.manifests
        commit = Commit(
            epoch=self._epoch,
            count=self._count,
            start=self._start,
            step=save.fields["step"],
            manifests=tuple(dict.fromkeys(manifests.values())),
            hosts=tuple(manifests),
            divided=save.fields["generation"] if save.is_divided else 0,
        )
        older = [each for each in self._counted if each.number != commit.number]
        best = [each for each in older[:-_REMEMBERED] if each.step == save.fields["best"]]
        self._counted = [*best, *older[-_REMEMBERED:], commit]
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
                copied, _ = self._copies.pop(answer.number, (None, None))
                save = copied or self._asked.get(answer.number)
                if save is None or not isinstance(answer, calls.Done):
                    continue
                if answer.problem:
                    text = f"{site.name}: step {save.fields['step']}: {answer.problem}"
                    self._events.append(
                        ("save-failed", {"step": save.fields["step"], "text": text})
                    )
                elif copied is not None:
                    save.copied.add(site.name)
                    if len(save.copied) == len(save.numbers):
                        self._count_it(save)
                elif site.name in save.manifests:
                    save.know.add(site.name)
                if len(save.know) >= save.needed and not save.said:
                    save.said = True
                    self._events.append(("saved", self._saved(save)))
                    self._join(save)
        events, self._events = self._events, []
        return events

    def _join(self, save: _Save) -> None:
        """Let the first host have whole what its first worker will read, after the last save."""
        needed = save.fields["needed"]
        if not (save.is_divided and needed):
            return
        steps = {*needed, save.fields["step"]}
        commits = [each for each in self._counted if each.divided and each.step in steps]
        number, sources = next(self._numbers), tuple(site.address for site in self._there())
        self._asked[number] = save
        order = calls.Join(number=number, run=self._run, commits=tuple(commits), sources=sources)
        next(site for site in self._sites if site.name == save.numbers[0]).tell(order)

    def _saved(self, save: _Save) -> dict[str, Any]:
        names = ("step", "seconds", "stall_seconds")
        known = {name: save.fields[name] for name in names}
        return {**known, "at": f"step-{known['step']:08d}", "hosts": sorted(save.manifests)}

    def close(self) -> list[Event]:
        """Wait for the last save to count; what has happened."""
        began = time.monotonic()
        events = self.look()
        while (patience := self._awaited_seconds) and time.monotonic() - began < patience:
            for site in self._sites:
                for _ in site.events(timeout_seconds=0.05 / len(self._sites)):
                    pass
            events += self.look()
        return events

    @property
    def _awaited_seconds(self) -> float:
        """How long to wait for what will count yet; 0: nothing will."""
        last, copying = self._last, self._copies.values()
        if any(s.gone is None and (last is None or c.order > last.order) for c, s in copying):
            return _COPY_SECONDS
        return 0.0 if last is None or last.said else _END_SECONDS


def _refuse_strangers(kept: Mapping[str, Kept]) -> None:
    """Raises RunError for checkpoints that no commit names: they would be dropped unseen."""
    found = strangers(kept)
    if found:
        named = "\n    ".join(f"{name}: {', '.join(saves)}" for name, saves in found.items())
        raise RunError(
            f"hosts have checkpoints that were saved without the others:\n    {named}\n"
            "    go on from them there by shoal resume, or remove these folders"
        )
