"""What takes long gives signs of life, or it would be taken for stuck."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from one_rank import built
from passing_on import newest
from shoal.data.tokenize import load_tokenizer
from shoal.engine.decision import Decision, given_layout
from shoal.engine.evaluate import complete
from shoal.engine.job import Inputs, Job
from shoal.launch import local
from shoal.launch.hang import LONG
from shoal.launch.local import resumed_recipe
from shoal.launch.pool import WorkerPool
from shoal.observe.events import Report, read_lines
from tiny import Bench
from workers import run_workers


def run(payload: dict[str, Any], descriptor: int) -> int:
    """Entry point of the worker."""
    marks: list[str] = []
    with built(payload, descriptor) as training:
        training.ranks.world.pulse.on_mark = lambda phase, step: marks.append(phase)
        folder = training.job.inputs.tokenizer_directory
        assert folder is not None
        tokenizer = load_tokenizer(folder)
        ((_, said),) = complete(training, prompts=["A:"], tokens=7, tokenizer=tokenizer)
    Report(descriptor).say("compared", found={"marks": marks, "said": said})
    return 0


def test_each_token_of_a_completion_is_one(bench: Bench, pool: WorkerPool, tmp_path: Path) -> None:
    """Evaluations of a small part of the data are short, and completions after them may not be."""
    trained = bench.run()
    recipe = resumed_recipe(trained.path, [])
    inputs = Inputs.from_json(newest(trained).state["inputs"])
    decision = Decision(given_layout(recipe), "processes", 1, 2, "float32", "a test")
    payload = {**Job(recipe, trained.path, inputs, decision).to_json(), "out": str(tmp_path)}
    (found,) = run_workers(pool, "fault.test_signs_of_life:run", payload, size=1)
    assert found["said"]
    assert found["marks"].count("complete") == 7
    assert "complete" in LONG, "the first token may take a while"


@contextmanager
def others_at_work(count: int) -> Iterator[None]:
    """So many processes that want every core, each with the rights of a session of its own."""
    command = [sys.executable, "-c", "while True: pass"]
    hogs = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for each in hogs:
            each.kill()
            each.wait()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "workers",
    [
        ("launch.workers=threads", "parallel.replicate=2"),
        ("launch.threads_per_worker=2", "parallel.replicate=1"),
    ],
)
def test_who_gets_little_time_is_not_taken_for_stuck(
    bench: Bench, workers: tuple[str, str]
) -> None:
    """Threads that compute while the main thread waits; in mid-run others take most of the time."""
    sizes = ("model.hidden_size=384", "model.intermediate_size=1536", "model.num_hidden_layers=6")
    much = ("train.global_batch_samples=64", "train.micro_batch_samples=16")
    short = ("train.steps=8", "train.evaluate_every_steps=0", "checkpoint.every_steps=0")
    out, story = bench.new_path(), list[dict[str, Any]]()

    def disturb() -> None:
        metrics = out / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count('"loss"') < 3:
            if ended.wait(0.05):
                return
        with others_at_work(12):
            ended.wait(40)

    ended = threading.Event()
    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        words = (*sizes, *much, *short, *workers)
        local.train(bench.recipe, words, out=out, console=False, pool=bench.pool, story=story)
    finally:
        ended.set()
        disturber.join()
    assert [each for each in story if each["event"] in ("stuck", "lost", "restarted")] == []
    rows = [row for row in read_lines(out / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 8
    seconds = [row["step_seconds"] for row in rows]
    assert max(seconds[3:]) > 3 * min(seconds[1:3]), "they did take the time"
