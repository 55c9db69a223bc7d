"""Saves behind the loop's back, of two ranks. Run as a script: kills each rank at each operation.

    python background.py FOLDER

Each rank is a `Saver` of its own; what they know of each other they know through the folder. The
script forks two processes for every file operation of one of them, which dies before it, and
asserts after each death that a whole checkpoint is there and that the next attempt can save.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

import states
from shoal.checkpoint.files import FaultyFiles, Files
from shoal.checkpoint.store import Store
from shoal.comm.flat import FlatLayout
from shoal.comm.group import ProcessGroup
from shoal.engine.saving.saver import Note, Saver
from shoal.engine.state import FlatState
from shoal.layout import Layout

SHAPES = {"weight": (8, 6), "bias": (5,), "head": (6, 8)}


def state_of(step: int) -> FlatState:
    """Values that tell the step, each element apart."""
    layout = FlatLayout.of({"matrices": {}, "decay": SHAPES, "plain": {}, "frozen": {}})
    values = torch.arange(float(layout.numel)) + 1000 * step
    moments = {kind: values + n for n, kind in enumerate(("exp_avg", "exp_avg_sq"), 1)}
    return states.state_of(layout, values, moments)


def group_of(rank: int, size: int) -> ProcessGroup:
    """A rank whose collectives fail: nothing here may need one."""
    group = ProcessGroup()
    group.rank, group.size = rank, size
    return group


class Ranks:
    """The savers of all ranks of one attempt."""

    def __init__(
        self,
        folder: Path,
        *,
        size: int = 2,
        token: str = "aaaa",
        files: dict[int, Files] | None = None,
        patience_seconds: float = 30.0,
        keep: int = 2,
    ) -> None:
        self.groups = [group_of(rank, size) for rank in range(size)]
        given = files or {}
        self.savers = [
            Saver(
                Store(folder, files=given.get(rank)),
                keep=keep,
                background=True,
                patience_seconds=patience_seconds,
            )
            for rank in range(size)
        ]
        for saver in self.savers:
            saver.leave(token=token)

    def save(self, step: int, *, rank: int) -> None:
        """One rank's call; the state is changed as soon as it returns."""
        state = state_of(step)
        self.savers[rank].save(
            state,
            group=self.groups[rank],
            layout=Layout(replicate=len(self.groups)),
            step=step,
            facts=lambda: {"progress": {"step": step}},
            own={"random_state": f"{rank:02x}"},
        )
        for tensor in state.resident():
            tensor.fill_(-1.0)

    def save_all(self, step: int, *, wait: bool = True) -> None:
        """Every rank's call; the thread that publishes is waited for."""
        for rank in range(len(self.savers)):
            self.save(step, rank=rank)
        if wait:
            assert all(saver.wait(timeout_seconds=20) for saver in self.savers)

    def notes(self) -> list[Note]:
        """What rank 0 has to tell."""
        return self.savers[0].notes()


def newest(folder: Path) -> int:
    """The newest whole checkpoint, every value compared."""
    store = Store(folder)
    step = store.newest_good(on_bad=lambda *_: None)
    reader, wanted = store.open(step), state_of(step)
    for kind in ("parameter", "exp_avg", "exp_avg_sq"):
        for name, tensor in wanted.named(kind).items():
            assert torch.equal(reader.read(name, kind=kind), tensor), (step, kind, name)
    assert reader.state["progress"]["step"] == step
    return step


def in_child(folder: Path, *, rank: int, files: Files) -> int:
    """Rank `rank` of the save of step 3 in a process of its own; rank 0 does not wait for ever."""
    child = os.fork()
    if child:
        return child
    ranks = Ranks(folder, files={rank: files})
    ranks.save(3, rank=rank)
    if not ranks.savers[rank].wait(timeout_seconds=0.2):
        ranks.savers[rank].leave()
        ranks.savers[rank].wait(timeout_seconds=5)
    os._exit(0)


def kill_every_operation(folder: Path) -> dict[int, int]:
    """Operations of each rank; each was killed once, and a good step was left each time."""
    counts = {}
    for victim in (0, 1):
        counting = FaultyFiles()
        count_in = folder / f"count-{victim}"
        for step in (1, 2):
            Ranks(count_in).save_all(step)
        Ranks(count_in, files={victim: counting}).save_all(3)
        assert newest(count_in) == 3
        counts[victim] = counting.count
        for at in range(counting.count):
            here = folder / f"{victim}-{at:02d}"
            for step in (1, 2):
                Ranks(here).save_all(step)
            faulty = FaultyFiles(at=at, fault="kill")
            files: dict[int, Files] = {victim: faulty, 1 - victim: Files()}
            children = [in_child(here, rank=rank, files=files[rank]) for rank in (0, 1)]
            codes = [os.waitpid(child, 0)[1] for child in children]
            assert os.WIFSIGNALED(codes[victim]), f"{victim}-{at} did not fire"
            assert os.WTERMSIG(codes[victim]) == signal.SIGKILL
            assert newest(here) in (2, 3), f"rank {victim} at {at}"
            Ranks(here, token="bbbb").save_all(4)
            assert newest(here) == 4 and len(Store(here).steps()) <= 2
            left = [path.name for path in here.iterdir() if path.name.startswith(".")]
            assert left == [], f"rank {victim} at {at} left {left}"
            shutil.rmtree(here)
    return counts


if __name__ == "__main__":
    began = time.monotonic()
    found = kill_every_operation(Path(sys.argv[1]))
    print(found[0], found[1])
    print(f"{time.monotonic() - began:.1f} s", file=sys.stderr)
