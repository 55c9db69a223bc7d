"""What the page reads of a folder of runs, and what it leaves there."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from made_runs import MadeRun
from shoal.errors import RunError, UserError
from shoal.page import shelf
from shoal.page.feed import Feed
from shoal.page.shelf import Shelf
from tiny import Bench


def test_runs_are_found_two_folders_deep_the_newest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("a", "group/b", "group/deep/c", ".hidden")):
        run = MadeRun(tmp_path / name)
        run.rows(1, 2)
        for file in run.path.iterdir():
            os.utime(file, (1000 + number, 1000 + number))
    assert list(Shelf(tmp_path).runs()) == ["group/b", "a"]
    assert list(Shelf(tmp_path / "a").runs()) == ["a"]
    monkeypatch.chdir(tmp_path / "a")
    assert list(Shelf(Path()).runs()) == ["a"]


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such folder; give a run"):
        Shelf(tmp_path / "none")
    with pytest.raises(RunError, match=r"holds no run .*shoal train quickstart"):
        Shelf(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="no such folder"):
        Shelf(tmp_path / "file")


@pytest.mark.parametrize("name", ["../out", "/etc", "", ".", "a/../a", "a/", "b"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    MadeRun(tmp_path / "runs" / "a")
    MadeRun(tmp_path / "out")
    (tmp_path / "runs" / "b").symlink_to(tmp_path / "out")
    shelved = Shelf(tmp_path / "runs")
    assert shelved.find("a") is not None and shelved.find(name) is None


def test_the_state_of_a_real_run(bench: Bench) -> None:
    run = bench.run("parallel.replicate=2", "launch.workers=processes", "train.steps=10")
    state = Shelf(bench.folder).state(run.path)
    assert state["problems"] == [] and not state["active"] and state["of_steps"] == 10
    assert state["task"] == "causal-lm" and state["seed"] == 3 and state["policy"] == "every-step"
    assert state["plan"]["layout"]["replicate"] == 2 and state["model"]
    assert [each["step"] for each in state["checkpoints"]] == [10]
    assert state["checkpoints"][0]["bytes"] > 10_000
    assert state["pictures"] == []  # loss.png is what the page draws itself


def test_a_real_run_crosses_whole(bench: Bench) -> None:
    run = bench.run("parallel.replicate=2", "launch.workers=processes", "train.steps=10")
    name = run.path.name
    told = {event.name: event.data for event in Feed(Shelf(bench.folder), [name]).poll()}
    assert told["rows"]["steps"]["loss"] == run.losses and told["rows"]["broken"] == 0
    assert [row["evaluation_loss"] for row in told["rows"]["evaluations"]] == [
        row["evaluation_loss"] for row in run.evaluations
    ]
    assert [each["event"] for each in told["events"]["events"]] == run.events
    assert "replica 1" in told["rows"]["newest"]["sent_bytes_by_link"]


def test_a_stream_goes_on_after_its_last_id_and_with_nothing_else(tmp_path: Path) -> None:
    one, other = MadeRun(tmp_path / "one"), MadeRun(tmp_path / "other")
    one.rows(1, 5)
    other.rows(1, 3)
    one.event("started", step=0)
    shelved = Shelf(tmp_path)
    last = Feed(shelved, ["one", "other"]).poll()[-1].id
    one.rows(5, 7)
    again = [e for e in Feed(shelved, ["one", "other"], resumed=last).poll() if e.name == "rows"]
    assert [(e.data["run"], e.data["steps"]["step"]) for e in again] == [("one", [5, 6])]
    # in another order, and beside a run that was not shown
    swapped = Feed(shelved, ["other", "one"], resumed=last).poll()
    assert [e.data["run"] for e in swapped if e.name == "rows"] == ["one"]
    for id in ("nonsense", "1:2:3", "," * 9000):
        fresh = Feed(shelved, ["one"], resumed=id).poll()
        assert [e.data["steps"]["step"] for e in fresh if e.name == "rows"] == [[*range(1, 7)]]


def test_nothing_is_said_twice(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "one")
    run.rows(1, 3)
    feed = Feed(Shelf(tmp_path), ["one"])
    assert {event.name for event in feed.poll()} >= {"runs", "state", "rows"}
    assert feed.poll() == []
    run.workers("computes")
    assert [event.name for event in feed.poll()] == ["workers"]


def test_workers_are_those_of_now(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "one")
    run.workers("computes", "waits")
    assert [each["state"] for each in shelf.workers(run.path)["workers"]] == ["computes", "waits"]
    text = (run.path / "workers.json").read_text()
    (run.path / "workers.json").write_text(text.replace(f"{int(time.time())}", "1000", 1))
    for old in ((run.path / "workers.json").read_text(), "[]", "{", '{"written_at": "now"}'):
        (run.path / "workers.json").write_text(old)
        assert shelf.workers(run.path) == {}


def test_orders_are_left_where_somebody_obeys_them(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "one")
    with pytest.raises(UserError, match="nothing is at work in this run"):
        shelf.leave_order(run.path, "STOP")
    (run.path / ".lock").write_text("999999999\n")  # of a process that was killed
    with pytest.raises(UserError, match="nothing is at work"):
        shelf.leave_order(run.path, "SAVE")
    run.lock()
    shelf.leave_order(run.path, "SAVE")
    shelf.leave_order(run.path, "SAVE")
    assert (run.path / "SAVE").read_bytes() == b"" and not (run.path / "STOP").exists()
    for word in ("save", "../SAVE", "config.yaml", ""):
        with pytest.raises(UserError, match="expected SAVE or STOP"):
            shelf.leave_order(run.path, word)


def test_no_order_writes_through_a_link(tmp_path: Path) -> None:
    run = MadeRun(tmp_path / "one")
    run.lock()
    (run.path / "SAVE").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="cannot be written"):
        shelf.leave_order(run.path, "SAVE")
    assert not (tmp_path / "elsewhere").exists()


def test_a_servers_record_stands_among_runs(tmp_path: Path) -> None:
    MadeRun(tmp_path / "run").rows(1, 3)
    served = tmp_path / "served"
    served.mkdir()
    (served / "serving.json").write_text('{"model": "m", "address": "a", "more": [1]}')
    (served / ".lock").write_text(f"{os.getpid()}\n")
    shelved = Shelf(tmp_path)
    assert set(shelved.runs()) == {"run", "served"}
    state = shelved.state(served)
    assert state["active"] and state["problems"] == []
    assert state["serving"] == {"model": "m", "address": "a", "threads": None}
    with pytest.raises(UserError, match="a server takes no orders here"):
        shelf.leave_order(served, "STOP")
    feed = Feed(shelved, ["served"])
    assert "served" not in {event.name for event in feed.poll()}
    with open(served / "serving.jsonl", "a") as file:
        file.write('{"at": 5.0, "seconds": 1.0, "requests": 2}\n')
    (told,) = feed.poll()
    assert told.name == "served" and told.data["served"]["requests_per_second"] == [2.0]
    assert Feed(shelved, ["served"], resumed=told.id).poll()[-1].name != "served"
    (served / "serving.jsonl").write_text('{"at": 9.0, "seconds": 1.0, "requests": 1}\n')
    (anew,) = feed.poll()
    assert anew.data["anew"] and anew.data["served"]["at"] == [9.0]
    (served / "serving.json").write_text("{")
    assert "serving.json: cannot be read" in shelved.state(served)["problems"][0]
