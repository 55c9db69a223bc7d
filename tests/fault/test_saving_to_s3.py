"""Runs that save to an S3 that is a server of its own: it goes away, it is wrong, a run is lost."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from processes import wait_until

from s3_server import S3, s3
from tiny import Bench, Run, shoal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not (find_spec("moto") and find_spec("s3fs")), reason="no moto or s3fs"),
]
TWO = ("parallel.replicate=2", "launch.workers=processes")
LENGTH = (*TWO, "train.steps=12", "train.evaluate_every_steps=6", "checkpoint.every_steps=4")


@pytest.fixture(scope="module")
def store() -> Iterator[S3]:
    with s3() as made:
        made.names("bucket", make=True)
        yield made


def command(bench: Bench, store: S3, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return bench.command(*map(str, words), env={**os.environ, **store.env}, timeout=300)


def events(run: Run, name: str) -> list[dict[str, Any]]:
    from shoal.observe.events import read_lines

    return [row for row in read_lines(run.path / "events.jsonl") if row["event"] == name]


def test_a_run_saves_stops_goes_on_and_is_merged(bench: Bench, store: S3, tmp_path: Path) -> None:
    url, run = "s3://bucket/whole", Run(bench.new_path())
    words = (*LENGTH, f"checkpoint.where={url}")
    first = ("train", bench.recipe, *words, "train.stop_after_steps=6", "--out", run.path)
    done = command(bench, store, *first)
    assert done.returncode == 0, done.stderr
    done = command(bench, store, "resume", run.path, "parallel.replicate=1")
    assert done.returncode == 0, done.stderr
    plain = bench.train(*LENGTH, "train.stop_after_steps=6")
    bench.resume(plain, "parallel.replicate=1")
    assert run.digits == plain.digits and run.weights == plain.weights
    saves = {name.split("/")[1] for name in store.names("bucket/whole") if name.count("/") == 2}
    assert saves == {"step-00000008.s2", "step-00000012.s2"}
    done = command(bench, store, "merge", url, "--out", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged/model.safetensors").read_bytes() == (
        run.path / "model/model.safetensors"
    ).read_bytes()


def test_what_a_user_has_wrong_is_one_message_at_the_start(bench: Bench, store: S3) -> None:
    for where, more, words in (
        ("s3://none/a", {}, "s3://none/a/check-"),
        ("s3://none/a", {}, "no such bucket"),
        ("s3://bucket/a", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "Could not connect"),
    ):
        out = bench.new_path()
        env = {**os.environ, **store.env, **more}
        done = bench.command(
            "train", str(bench.recipe), f"checkpoint.where={where}", "--out", str(out), env=env
        )
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
        assert "checkpoint.where names a bucket that is there" in done.stderr
        assert not out.exists()


def test_a_store_that_falls_silent_costs_saves_and_not_the_run(
    bench: Bench, store: S3, tmp_path: Path
) -> None:
    """Steps go on; what could not be saved is named; the end waits for the store to be back."""
    run = Run(bench.new_path())
    words = (
        *TWO,
        "train.steps=3000",
        "train.evaluate_every_steps=1500",
        "checkpoint.every_steps=5",
    )
    words += ("checkpoint.where=s3://bucket/silent", "checkpoint.keep_best=false")
    line = shoal("train", bench.recipe, *words, "--out", run.path)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            line, env={**os.environ, **store.env}, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        wait_until(lambda: len(events(run, "saved")) > 1, what="a save")
        store.fall_silent()
        before = len(run.losses)
        wait_until(lambda: len(events(run, "save-skipped")) > 0, what="a skipped save", seconds=90)
        assert len(run.losses) > before, "steps went on"
        saved = len(events(run, "saved"))
        store.answer_again()
        wait_until(lambda: len(events(run, "saved")) > saved, what="another save", seconds=120)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 75, (tmp_path / "log").read_text()[-3000:]
    finally:
        store.answer_again()
        process.kill()
        process.wait()
    last = len(run.losses)
    assert events(run, "saved")[-1]["step"] == last
    names = store.names("bucket/silent")
    assert f"silent/step-{last:08d}.s1/manifest.json" in names
    assert len({name.split("/")[1] for name in names if name.count("/") == 2}) == 2


def test_a_machine_is_lost_and_another_goes_on_from_the_store(
    bench: Bench, store: S3, tmp_path: Path
) -> None:
    """Killed while it saves; its folder is gone; what it left half written goes."""
    url, lost, run = "s3://bucket/lost", Run(bench.new_path()), Run(bench.new_path())
    words = (*TWO, "train.steps=400", "train.evaluate_every_steps=200", "checkpoint.every_steps=10")
    words += ("checkpoint.keep_best=false",)
    where = f"checkpoint.where={url}"
    line = shoal("train", bench.recipe, *words, where, "--out", lost.path)
    process = subprocess.Popen(
        line, env={**os.environ, **store.env}, stdout=subprocess.DEVNULL, start_new_session=True
    )
    wait_until(lambda: len(lost.losses) > 60, what="steps")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    again = ("train", bench.recipe, *words, where, "--go-on", "--out", run.path)
    done = command(bench, store, *again)
    assert done.returncode == 0, done.stderr
    whole = bench.run(*words)
    assert run.weights == whole.weights
    assert 0 < len(run.losses) < 400 and run.losses == whole.losses[-len(run.losses) :]
    names = [name for name in store.names("bucket/lost") if name.count("/") == 2]
    assert {name.split("/")[1] for name in names} == {"step-00000390.s2", "step-00000400.s2"}
    assert len(names) == 6, "a manifest and two parts of each"
