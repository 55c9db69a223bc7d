"""A small save whose every file operation can be made to fail. Run as a script: kills each one.

    python saves.py FOLDER

saves steps 1 and 2, then forks a child for every operation of the save of step 3 that dies before
it, and asserts after each death that a whole checkpoint is there and that saving works again.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from shoal.boxes import Box, Piece
from shoal.checkpoint.files import FaultyFiles, Files
from shoal.checkpoint.store import Store


def pieces(step: int, *, rank: int) -> list[Piece]:
    """Two boxes of a matrix (rows `rank`), and a vector, with values that tell the step."""
    shape = (4, 6)
    rows = torch.full((2, 6), float(step)) + torch.arange(12.0).view(2, 6)
    found = [Piece("weight", "parameter", shape, Box((2 * rank, 0), (2, 6)), rows)]
    if rank == 0:
        vector = torch.full((3,), float(step))
        found.append(Piece("bias", "exp_avg", (3,), Box.whole((3,)), vector))
    return found


def save(folder: Path, step: int, *, files: Files | None = None, keep: int = 2) -> None:
    """A save of two ranks, as `engine/saving/parts.py` does it."""
    store = Store(folder, files=files)
    store.begin(step)
    parts = [store.write_part(step, rank=rank, pieces=pieces(step, rank=rank)) for rank in (0, 1)]
    store.publish(step, parts=parts, state={"progress": {"step": step}}, keep=keep)


def newest(folder: Path) -> int:
    """The newest whole checkpoint, read to the last value."""
    store = Store(folder)
    step = store.newest_good(on_bad=lambda *_: None)
    reader = store.open(step)
    assert float(reader.read("weight")[0, 0]) == step
    assert reader.read("bias", kind="exp_avg").tolist() == [step] * 3
    assert reader.state["progress"]["step"] == step
    return step


def prepare(folder: Path, *, resave: bool) -> None:
    """Steps 1 and 2; with `resave`, also a damaged step 3, as after a bad disk."""
    for step in (1, 2):
        save(folder, step)
    if resave:
        save(folder, 3, keep=3)
        (folder / "step-00000003/rank-00001.safetensors").write_bytes(b"damaged")


def count_operations(folder: Path, *, resave: bool) -> int:
    prepare(folder, resave=resave)
    counting = FaultyFiles()
    save(folder, 3, files=counting)
    return counting.count


def kill_every_operation(folder: Path, *, resave: bool) -> int:
    """How many operations a save has; each was killed once, and a good step was left each time."""
    count = count_operations(folder / "count", resave=resave)
    for at in range(count):
        here = folder / f"at-{at:02d}"
        prepare(here, resave=resave)
        child = os.fork()
        if child == 0:
            save(here, 3, files=FaultyFiles(at=at, fault="kill"))
            os._exit(0)
        _, code = os.waitpid(child, 0)
        assert os.WIFSIGNALED(code) and os.WTERMSIG(code) == signal.SIGKILL, f"{at} did not fire"
        assert newest(here) in (2, 3), f"operation {at}"
        save(here, 4)
        assert newest(here) == 4
        assert len(Store(here).steps()) <= 2
        leftovers = [path.name for path in here.iterdir() if path.name.startswith(".")]
        assert leftovers == [], f"operation {at} left {leftovers}"
        shutil.rmtree(here)
    return count


if __name__ == "__main__":
    for again in (False, True):
        print(kill_every_operation(Path(sys.argv[1]) / str(again), resave=again))
