"""Saves on disks of their own: no history of losses lets a run go on from what does not count.

Hosts save, hear of commits or do not, lose their disk, come back with an old one, have a file torn;
starts use any of them. Which save a start must take is reckoned from the history alone.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import xxhash
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from shoal.checkpoint.disks import (
    COPIES,
    RECORD,
    Commit,
    candidates,
    kept_in,
    manifest_hash,
    next_epoch,
    note,
    run_of,
    save_damage,
    settle,
    take,
)
from shoal.checkpoint.files import FaultyFiles, Files
from shoal.checkpoint.folders import published_name, published_steps, waiting_name, waiting_saves
from shoal.checkpoint.manifest import NAME, FileRecord, Manifest, Part
from shoal.errors import RunError

FILES, RUN, KEEP = Files(), "r1", 3
HOSTS = ("h1", "h2", "h3")
_FILE = "rank-00000.safetensors"
some = st.sets(st.sampled_from(HOSTS), min_size=1)
one = st.sampled_from(HOSTS)


def leave(checkpoints: Path, *, step: int, generation: int, save: str, host: str) -> str:
    """A whole save that waits; the hash of its manifest."""
    folder = checkpoints / waiting_name(step, generation=generation)
    folder.mkdir(parents=True)
    content = f"{save} of {host}".encode() * 50
    (folder / _FILE).write_bytes(content)
    record = FileRecord(_FILE, len(content), xxhash.xxh3_64_hexdigest(content))
    (folder / NAME).write_bytes(Manifest(step, Part((record,)), {"save": save}).to_bytes())
    return manifest_hash(folder)


@dataclass
class Disk:
    """What a host must have, as the history says: saves that are intact, commits it knows of."""

    saves: dict[str, bool] = field(default_factory=dict)
    """By their manifest: whether each byte is right."""
    commits: dict[tuple[int, int], Commit] = field(default_factory=dict)


class Histories(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.disks = {name: Disk() for name in HOSTS}
        self.old: dict[str, tuple[Path, Disk]] = {}
        self.members: set[str] = set()
        self.step = self.generation = self.count = self.starts = self.epoch = 0
        self.start(set(HOSTS))

    def place(self, name: str) -> Path:
        return self.folder / name / "checkpoints"

    @precondition(lambda self: self.members)
    @rule(steps=st.integers(1, 3), who=some, told=some)
    def save(self, steps: int, who: set[str], told: set[str]) -> None:
        """Some of those that train have it whole; some hear that it counts, if it does."""
        self.step, self.generation = self.step + steps, self.generation + 1
        saved: dict[str, str] = {}
        for name in sorted(who & self.members):
            known = {"step": self.step, "generation": self.generation, "host": name}
            saved[name] = leave(self.place(name), save=f"{self.generation}", **known)
            self.disks[name].saves[saved[name]] = True
        if len(saved) < min(COPIES, len(self.members)):
            return
        self.count += 1
        manifests = tuple(saved.values())
        number = (self.epoch, self.count)
        commit = Commit(*number, f"start {self.starts}", self.step, manifests, tuple(saved))
        for name in sorted(told & self.members):
            note(self.place(name), commit, run=RUN, files=FILES)
            has = take(self.place(name), commit, keep=KEEP, best=None, files=FILES)
            assert has == (name in saved)
            self.disks[name].commits[number] = commit

    @rule(name=one)
    def lose(self, name: str) -> None:
        """For good: another host takes its name, with an empty disk."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        self.disks[name] = Disk()

    @rule(name=one, cut=st.booleans())
    def tear(self, name: str, cut: bool) -> None:
        """A byte of its newest save is another, or the last one is missing."""
        published = published_steps(self.place(name))
        if published:
            folder = self.place(name) / published_name(published[-1])
            manifest, file = manifest_hash(folder), folder / _FILE
            content = file.read_bytes()
            file.write_bytes(content[:-1] if cut else content[:-1] + b"?")
            if manifest:
                self.disks[name].saves[manifest] = False

    @rule(name=one)
    def photograph(self, name: str) -> None:
        kept = self.folder / f"old-{name}"
        shutil.rmtree(kept, ignore_errors=True)
        self.old.pop(name, None)
        if self.place(name).is_dir():
            shutil.copytree(self.folder / name, kept)
            disk = self.disks[name]
            self.old[name] = kept, Disk(dict(disk.saves), dict(disk.commits))

    @rule(name=one)
    def come_back_with_an_old_disk(self, name: str) -> None:
        if name in self.old:
            kept, disk = self.old[name]
            shutil.rmtree(self.folder / name, ignore_errors=True)
            shutil.copytree(kept, self.folder / name)
            self.disks[name] = Disk(dict(disk.saves), dict(disk.commits))

    @rule(there=some)
    def start(self, there: set[str]) -> None:
        """Who trains ends; a coordinator begins with those that are there."""
        self.members = set()
        kept = {name: kept_in(self.place(name)) for name in sorted(there)}
        known = [c for name in there for c in self.disks[name].commits.values()]
        last = max((each.epoch for each in known), default=0)
        if len({each.start for each in known if each.epoch == last}) > 1:
            with pytest.raises(RunError, match="without each other"):
                list(candidates(kept))
            return
        wanted = max(
            (each for each in known if self.intact(each, there)), key=number_of, default=None
        )
        found = None
        for commit, holders in candidates(kept):
            assert self.intact(commit, there) <= set(holders) <= there
            whole = [name for name in holders if self.adopt(name, commit)]
            assert set(whole) == self.intact(commit, there)
            if whole:
                found = commit
                for name in sorted(there - set(whole)):
                    self.copy(whole[0], name, commit)
                break
        assert (found and found.number) == (wanted and wanted.number)
        assert run_of(kept) in ("", RUN)
        if found is None and known:
            return  # refused: nobody has a save whole any more
        for name in sorted(there):
            self.settle(name, found)
        self.members, self.starts = there, self.starts + 1
        self.epoch, self.count = next_epoch(kept), 0
        assert self.epoch == last + 1
        self.step = found.step if found else 0

    def intact(self, commit: Commit, there: set[str]) -> set[str]:
        named = {
            manifest
            for name in there
            for each in self.disks[name].commits.values()
            if each.number == commit.number
            for manifest in each.manifests
        }
        return {n for n in there if any(self.disks[n].saves.get(each) for each in named)}

    def adopt(self, name: str, commit: Commit) -> bool:
        """As an agent does that is told to have it, with nobody to ask."""
        place = self.place(name)
        take(place, commit, keep=1 << 30, best=None, files=FILES)
        return save_damage(place / published_name(commit.step)) is None

    def copy(self, source: str, name: str, commit: Commit) -> None:
        """As peers do (launch/peers.py)."""
        folder = self.place(name) / published_name(commit.step)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.place(source) / folder.name, folder)

    def settle(self, name: str, commit: Commit | None) -> None:
        place, disk = self.place(name), self.disks[name]
        place.mkdir(parents=True, exist_ok=True)
        if commit is not None:
            note(place, commit, run=RUN, files=FILES)
            disk.commits = {n: c for n, c in disk.commits.items() if n < commit.number}
            disk.commits[commit.number] = commit
        settle(place, commit, files=FILES)
        steps = published_steps(place)
        assert not waiting_saves(place), "none of them counts"
        assert bool(steps) == (commit is not None)
        if commit is not None:
            newest = place / published_name(steps[-1])
            assert steps[-1] == commit.step and save_damage(newest) is None
            assert manifest_hash(newest) in commit.manifests
        kept = kept_in(place).saves
        disk.saves = {each: save_damage(place / folder) is None for each, folder in kept.items()}

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


def number_of(commit: Commit) -> tuple[int, int]:
    return commit.number


@pytest.mark.parametrize("histories", [30, pytest.param(600, marks=pytest.mark.slow)])
def test_no_history_goes_on_from_what_does_not_count(histories: int) -> None:
    known = settings(max_examples=histories, stateful_step_count=25, deadline=None)
    run_state_machine_as_test(Histories, settings=known)


def commit_of(step: int, *manifests: str, count: int = 1) -> Commit:
    return Commit(1, count, "s", step, manifests, ("h1",))


def test_a_record_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    """Whichever operation is the last one."""
    probe = FaultyFiles()
    note(tmp_path / "probe", commit_of(10), run=RUN, files=probe)
    assert probe.count > 3
    for at in range(probe.count):
        place = tmp_path / str(at)
        note(place, commit_of(10), run=RUN, files=FILES)
        with pytest.raises(OSError, match="planned"):
            note(place, commit_of(20, count=2), run=RUN, files=FaultyFiles(at=at, fault="io"))
        known = [each.step for each in kept_in(place).commits]
        assert known in ([10], [10, 20]), at
        note(place, commit_of(20, count=2), run=RUN, files=FILES)
        assert [each.step for each in kept_in(place).commits] == [10, 20]


def test_a_damaged_record_says_nothing(tmp_path: Path) -> None:
    note(tmp_path, commit_of(10), run=RUN, files=FILES)
    (tmp_path / RECORD).write_text('{"run": "r1", "commits": [{"epoch": -1}]}')
    assert kept_in(tmp_path).commits == ()


def test_saves_of_two_runs_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        note(tmp_path / name, commit_of(10), run=name, files=FILES)
    kept = {f"h {name}": kept_in(tmp_path / name) for name in ("a", "b")}
    with pytest.raises(RunError, match="h a: run a\n    h b: run b"):
        run_of(kept)
