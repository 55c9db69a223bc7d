"""RUN/workers.json: what each worker does, and whom it waits for."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from shoal.launch.hang import Sighting
from shoal.launch.lanes import EVERY_SECONDS, Lanes, lanes
from shoal.observe.pulse import Beat


def seen(
    rank: int,
    *,
    phase: str = "forward",
    operation: str = "",
    collective: int = 4,
    silent: float = 0.1,
    usual: float = 0.2,
    state: str = "runs",
) -> Sighting:
    beat = Beat(0.0, usual, 7, collective, 100, 1, rank, phase, operation)
    return Sighting(rank, 1000 + rank, beat, silent, state)


def states(*sightings: Sighting, num_workers: int = 0) -> list[str]:
    found = lanes(sightings, num_workers=num_workers or len(sightings))
    return [each["state"] for each in found]


def test_who_computes_who_waits_and_for_whom() -> None:
    three = [seen(0, operation="sum"), seen(1, operation="sum"), seen(2, collective=3)]
    found = lanes(three, num_workers=3)
    assert [each["state"] for each in found] == ["waits", "waits", "computes"]
    assert [each["waits_for"] for each in found] == [[2], [2], []]
    assert found[2]["phase"] == "forward" and found[2]["step"] == 7


def test_all_in_a_collective_communicate_and_who_has_left_it_is_not_waited_for() -> None:
    assert states(seen(0, operation="sum"), seen(1, operation="sum")) == ["communicates"] * 2
    assert states(seen(0, operation="sum"), seen(1, collective=4)) == ["communicates", "computes"]


@pytest.mark.parametrize(
    ("sighting", "state"),
    [
        (seen(0, state="is stopped"), "silent"),
        (seen(0, silent=2.5), "silent"),
        (seen(0, silent=2.5, usual=1.0), "computes"),
        (seen(0, silent=2.5, usual=0.0), "computes"),  # it was never in this phase
        (seen(0, silent=9.0, phase="save"), "computes"),
        (seen(0, silent=9.0, phase="waiting for a generation"), "waits"),
        (seen(0, phase="starting"), "starts"),
        (Sighting(0, 1, None, 0.0, "runs"), "starts"),
    ],
)
def test_one_worker(sighting: Sighting, state: str) -> None:
    assert states(sighting) == [state]


def test_a_worker_that_nobody_sees_is_gone() -> None:
    assert states(seen(1), num_workers=3) == ["gone", "computes", "gone"]


def test_the_file_is_whole_and_written_a_few_times_a_second(tmp_path: Path) -> None:
    writer = Lanes(tmp_path, num_workers=1)
    writer.look([seen(0)])
    assert not list(tmp_path.iterdir()), "no run has begun here"
    (tmp_path / "config.yaml").write_text("")
    writer.look([seen(0)])
    first = json.loads((tmp_path / "workers.json").read_text())
    assert abs(first["written_at"] - time.time()) < 60 and len(first["workers"]) == 1
    writer.look([seen(0, phase="backward")])
    assert json.loads((tmp_path / "workers.json").read_text()) == first
    time.sleep(EVERY_SECONDS)
    writer.look([seen(0, phase="backward")])
    assert json.loads((tmp_path / "workers.json").read_text())["workers"][0]["phase"] == "backward"


def test_a_disk_that_takes_nothing_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "workers.json").mkdir()
    (tmp_path / "workers.json" / "file").write_text("")
    Lanes(tmp_path, num_workers=1).look([seen(0)])
    assert (tmp_path / "workers.json" / "file").exists()
