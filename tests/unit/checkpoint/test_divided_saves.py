"""Saves of hosts of which none has all: each its own boxes and a copy of another's, then joined."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
import torch

from shoal.boxes import Box, Piece
from shoal.checkpoint.disks import (
    RECORD,
    Commit,
    candidates,
    join,
    kept_in,
    manifest_hash,
    note,
    save_damage,
    settle,
    strangers,
    thin,
)
from shoal.checkpoint.files import FaultyFiles, Files
from shoal.checkpoint.folders import divided_name, divided_saves, published_name, published_steps
from shoal.checkpoint.store import Store
from shoal.errors import CheckpointError, RunError

FILES = Files()
WEIGHT = torch.arange(48, dtype=torch.float32).view(6, 8)


def save_own(checkpoints: Path, step: int, *, host: int, of: int = 3, generation: int = 1) -> str:
    """What host number `host` saves: its rows of `weight`, times the step; its manifest's hash."""
    store, rows = Store(checkpoints), WEIGHT.shape[0] // of
    token = f"g{generation}-0f"
    store.prepare(step, rank=0, token=token, generation=generation)
    box = Box((host * rows, 0), (rows, WEIGHT.shape[1]))
    own = Piece("weight", "parameter", tuple(WEIGHT.shape), box, WEIGHT[box.slices] * step)
    part = store.write_part(step, rank=host, pieces=[own], token=token)
    known = {"state": {"note": "n"}, "keep": 1, "token": token, "generation": generation}
    return manifest_hash(store.publish(step, parts=[part], host=host, **known))


def committed(folder: Path, step: int, *, count: int, of: int = 3, generation: int = 1) -> Commit:
    """A divided save of hosts h0, h1, ..., each of which has its own and the one before's."""
    disks = [folder / f"h{host}" for host in range(of)]
    known = {"of": of, "generation": generation}
    manifests = [save_own(disk, step, host=host, **known) for host, disk in enumerate(disks)]
    names = tuple(disk.name for disk in disks)
    commit = Commit(1, count, "s", step, tuple(manifests), names, divided=generation)
    for host, disk in enumerate(disks):
        shutil.copytree(disk / commit.folder(host), disks[(host + 1) % of] / commit.folder(host))
        note(disk, commit, run="r", files=FILES)
    return commit


def bring_all(disk: Path, commit: Commit, *, folder: Path) -> None:
    """As agents do of one another's disks."""
    for host in range(len(commit.manifests)):
        if not (disk / commit.folder(host)).exists():
            shutil.copytree(folder / f"h{host}" / commit.folder(host), disk / commit.folder(host))


def test_nothing_reads_it_before_it_is_joined(tmp_path: Path) -> None:
    commit = committed(tmp_path, 20, count=1)
    disk = tmp_path / "h1"
    assert [name for _, name in divided_saves(disk)] == [commit.folder(0), commit.folder(1)]
    assert Store(disk).steps() == [] and not strangers({"h1": kept_in(disk)})
    with pytest.raises(RunError, match="has what one host has saved, and not the other hosts'"):
        Store(disk).newest_good(on_bad=lambda step, why: None)
    with pytest.raises(CheckpointError, match="host-2"):
        join(disk, commit, files=FILES)
    assert Store(disk).steps() == []
    bring_all(disk, commit, folder=tmp_path)
    join(disk, commit, files=FILES)
    store = Store(disk)
    assert store.newest_good(on_bad=lambda step, why: None) == 20
    assert torch.equal(store.open(20).read("weight"), WEIGHT * 20)
    assert store.open(20).state["note"] == "n"


def test_a_joined_one_counts_as_what_it_is_of(tmp_path: Path) -> None:
    """And costs no room; one of another commit, or a damaged one, is made anew."""
    commit, disk = committed(tmp_path, 20, count=1), tmp_path / "h0"
    bring_all(disk, commit, folder=tmp_path)
    join(disk, commit, files=FILES)
    whole = disk / published_name(20)
    assert not strangers({"h0": kept_in(disk)})
    assert kept_in(disk).saves.keys() == commit.names
    settle(disk, commit, files=FILES)
    assert published_steps(disk) == [20] and len(divided_saves(disk)) == 3
    file = whole / "rank-00001.safetensors"
    assert file.samefile(disk / commit.folder(1) / file.name)
    before = (whole / "manifest.json").stat().st_mtime_ns
    join(disk, commit, files=FILES)
    assert (whole / "manifest.json").stat().st_mtime_ns == before, "left as it is"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-1] + b"?")
    assert save_damage(whole)
    join(disk, commit, files=FILES)
    assert not save_damage(whole)
    other = msgspec.structs.replace(commit, manifests=commit.manifests[::-1])
    assert manifest_hash(whole) not in other.names


def test_on_a_disk_without_hard_links_files_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, disk = committed(tmp_path, 20, count=1), tmp_path / "h0"
    bring_all(disk, commit, folder=tmp_path)

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(target))

    monkeypatch.setattr("os.link", refuse)
    join(disk, commit, files=FILES)
    assert torch.equal(Store(disk).open(20).read("weight"), WEIGHT * 20)


def test_whatever_fails_while_it_is_joined_it_is_whole_or_not_there(tmp_path: Path) -> None:
    commit, disk = committed(tmp_path, 20, count=1), tmp_path / "h0"
    bring_all(disk, commit, folder=tmp_path)
    clean = FaultyFiles()
    join(disk, commit, files=clean)
    shutil.rmtree(disk / published_name(20))
    assert clean.count > 3
    for at in range(clean.count):
        with pytest.raises(OSError, match="planned"):
            join(disk, commit, files=FaultyFiles(at=at, fault="io"))
        if published_steps(disk):
            assert not save_damage(disk / published_name(20))
            shutil.rmtree(disk / published_name(20))
        else:
            join(disk, commit, files=FILES)
            assert torch.equal(Store(disk).open(20).read("weight"), WEIGHT * 20)
            shutil.rmtree(disk / published_name(20))


def test_the_last_ones_and_the_best_one_stay(tmp_path: Path) -> None:
    commits = [committed(tmp_path, step, count=step // 10) for step in (10, 20, 30, 40)]
    disk = tmp_path / "h2"
    uncounted = save_own(disk, 25, host=2, generation=1)
    newer = save_own(disk, 50, host=2, generation=1)
    bring_all(disk, commits[2], folder=tmp_path)
    join(disk, commits[2], files=FILES)
    thin(disk, commits[-1], keep=1, best=10, files=FILES)
    saves = kept_in(disk).saves
    assert {step for step, _ in divided_saves(disk)} == {10, 40, 50}
    assert published_steps(disk) == [], "the joined one of 30 with the others of 30"
    assert newer in saves and uncounted not in saves, "50 may count yet"
    settle(disk, commits[-1], files=FILES)
    assert {step for step, _ in divided_saves(disk)} == {10, 40}
    (disk / RECORD).unlink()
    note(disk, commits[-1], run="r", files=FILES)
    thin(disk, commits[-1], keep=1, best=10, files=FILES)
    assert {step for step, _ in divided_saves(disk)} == {10, 40}, "however long ago that was"


def test_which_hosts_have_what(tmp_path: Path) -> None:
    """The newest first; of each its hosts, in order, whoever of them is asked."""
    first, second = committed(tmp_path, 10, count=1), committed(tmp_path, 20, count=2)
    shutil.rmtree(tmp_path / "h1")
    kept = {name: kept_in(tmp_path / name) for name in ("h2", "h0", "h1")}
    found = list(candidates(kept))
    assert [(c.step, c.manifests, c.hosts) for c, _ in found] == [
        (20, second.manifests, ("h0", "h1", "h2")),
        (10, first.manifests, ("h0", "h1", "h2")),
    ]
    assert sorted(found[0][1]) == ["h0", "h2"]
    there = {name for each in kept.values() for name in each.saves}
    assert set(second.manifests) <= there, "any one host may be lost"


def test_an_earlier_start_may_have_left_one_of_the_same_name(tmp_path: Path) -> None:
    name = divided_name(20, generation=1, host=0)
    (tmp_path / name).mkdir()
    (tmp_path / name / "rank-00000.safetensors").write_bytes(b"old")
    save_own(tmp_path, 20, host=0)
    assert not save_damage(tmp_path / name)
