"""A save that is killed, or meets a full or broken disk, at any operation; files that rot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import saves
import torch

from shoal.checkpoint.files import FaultyFiles
from shoal.checkpoint.store import Store
from shoal.comm.flat import FlatLayout
from shoal.comm.group import ProcessGroup
from shoal.engine.saving.saver import Saver
from shoal.engine.state import FlatState
from shoal.errors import CheckpointError, RunError
from shoal.layout import Layout
from states import state_of


def test_killed_at_every_operation_a_checkpoint_can_be_loaded(tmp_path: Path) -> None:
    script = [sys.executable, saves.__file__, str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    # make, remove, write, fsync, rename: what a save of two ranks and a manifest is made of
    assert all(int(count) >= 18 for count in done.stdout.split())


def tiny_state() -> FlatState:
    named = {"weight": (3, 4)}
    layout = FlatLayout.of({"matrices": {}, "decay": named, "plain": {}, "frozen": {}})
    moments = {kind: torch.ones(layout.numel) for kind in ("exp_avg", "exp_avg_sq")}
    return state_of(layout, torch.ones(layout.numel), moments)


def save_state(folder: Path, step: int, *, files: FaultyFiles | None = None) -> None:
    Saver(Store(folder, files=files), keep=2).save(
        tiny_state(),
        group=ProcessGroup(),
        layout=Layout(),
        step=step,
        facts=lambda: {"progress": {"step": step}},
        last=True,
    )


@pytest.mark.parametrize(
    ("fault", "said"), [("full", "no space left on the disk"), ("io", "Input/output error")]
)
def test_a_disk_that_fails_at_any_operation(tmp_path: Path, fault: str, said: str) -> None:
    counting = FaultyFiles()
    for step in (1, 2, 3):
        save_state(tmp_path / "count", step, files=counting if step == 3 else None)
    assert counting.count > 10
    for at in range(counting.count):
        folder = tmp_path / f"{fault}-{at}"
        save_state(folder, 1)
        save_state(folder, 2)
        with pytest.raises(RunError, match=said) as problem:
            save_state(folder, 3, files=FaultyFiles(at=at, fault=fault))
        assert str(folder) in str(problem.value) and "resume the run" in str(problem.value)
        assert Store(folder).newest_good(on_bad=lambda *_: None) in (2, 3)
        save_state(folder, 4)  # the disk is well again
        assert Store(folder).newest_good(on_bad=lambda *_: None) == 4


def damage(path: Path, *, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def places(size: int, *, every: int) -> list[int]:
    """The first bytes (header), the last ones, and samples between."""
    return sorted({*range(min(12, size)), *range(0, size, every), *range(max(0, size - 4), size)})


@pytest.mark.parametrize(
    "name", ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]
)
def test_any_flipped_byte_is_noticed_and_named(tmp_path: Path, name: str) -> None:
    for step in (1, 2):
        saves.save(tmp_path, step)
    path = tmp_path / "step-00000002" / name
    whole = path.read_bytes()
    for at in places(len(whole), every=11):
        damage(path, at=at)
        with pytest.raises(CheckpointError, match="damaged") as problem:
            Store(tmp_path).verify(2)
        assert str(path) in str(problem.value), f"byte {at}"
        path.write_bytes(whole)
    assert saves.newest(tmp_path) == 2


def test_white_space_in_the_manifest_counts(tmp_path: Path) -> None:
    saves.save(tmp_path, 1)
    path = tmp_path / "step-00000001/manifest.json"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(CheckpointError, match=r"manifest\.json: damaged"):
        Store(tmp_path).verify(1)


@pytest.mark.parametrize("name", ["manifest.json", "rank-00001.safetensors"])
@pytest.mark.parametrize("how", ["cut", "empty", "gone"])
def test_a_file_cut_short_or_gone(tmp_path: Path, name: str, how: str) -> None:
    for step in (1, 2):
        saves.save(tmp_path, step)
    path = tmp_path / "step-00000002" / name
    content = path.read_bytes()
    path.unlink()
    if how != "gone":
        path.write_bytes(content[:-1] if how == "cut" else b"")
    said: list[tuple[int, str]] = []
    assert Store(tmp_path).newest_good(on_bad=lambda *found: said.append(found)) == 1
    ((step, reason),) = said
    assert step == 2 and str(path) in reason


def test_a_box_is_checked_when_it_is_read(tmp_path: Path) -> None:
    saves.save(tmp_path, 1)
    reader = Store(tmp_path).open(1)
    path = tmp_path / "step-00000001/rank-00001.safetensors"
    damage(path, at=path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors: .*damaged"):
        reader.read("weight")


def test_a_damaged_later_checkpoint_never_crowds_out_good_ones(tmp_path: Path) -> None:
    """After falling back from step 3, a save of step 2 with `keep=1` must keep step 2."""
    for step in (1, 3):
        saves.save(tmp_path, step)
    (tmp_path / "step-00000003/manifest.json").write_bytes(b"rotten")
    assert saves.newest(tmp_path) == 1
    saves.save(tmp_path, 2, keep=1)
    assert saves.newest(tmp_path) == 2
    assert Store(tmp_path).steps() == [2]


def test_nothing_to_trust(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no checkpoint here; nothing to resume from"):
        Store(tmp_path / "none").newest_good(on_bad=lambda *_: None)
    saves.save(tmp_path, 1)
    (tmp_path / "step-00000001/manifest.json").write_bytes(b"{}")
    with pytest.raises(RunError, match=r"no checkpoint can be trusted(.|\n)*manifest\.json"):
        Store(tmp_path).newest_good(on_bad=lambda *_: None)
