"""Hogwild by the product's own loop: one thread is one worker, several learn, some it cannot do."""

from __future__ import annotations

import pytest

from shoal.data.verify import verify_run
from shoal.errors import ConfigError
from shoal.observe.events import read_lines
from tiny import Bench

HOGWILD = "sync={kind: hogwild}"


@pytest.mark.parametrize("workers", ["threads", "auto"])
def test_one_thread_is_one_worker_bit_for_bit(bench: Bench, workers: str) -> None:
    wanted = bench.run("parallel.replicate=1")
    found = bench.run("parallel.replicate=1", HOGWILD, f"launch.workers={workers}")
    assert found.digits == wanted.digits and found.weights == wanted.weights


def test_threads_without_locks_learn_and_account_for_what_they_read(bench: Bench) -> None:
    alone = bench.run("parallel.replicate=1")
    found = bench.run("parallel.replicate=4", HOGWILD, "launch.workers=threads")
    assert [row["step"] for row in found.rows if "loss" in row] == list(range(1, 31))
    # four times as many updates of a quarter of the batch each: no worse than one thread
    assert found.evaluations[-1]["evaluation_loss"] < alone.evaluations[-1]["evaluation_loss"] + 0.1
    report = verify_run(found.path)
    assert (report.num_steps, report.problems) == (30, [])


def test_a_stop_is_agreed_where_threads_meet_and_a_resume_goes_on(bench: Bench) -> None:
    how = (
        "parallel.replicate=2",
        "launch.workers=threads",
        "sync={kind: hogwild, meet_every_steps: 4}",
    )
    run = bench.train(*how, "train.stop_after_steps=11")
    bench.resume(run)
    assert [row["step"] for row in run.rows if "loss" in row] == list(range(1, 31))
    events = [row["event"] for row in read_lines(run.path / "events.jsonl")]
    assert "resumed" in events and events[-1] == "finished"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("launch.workers=processes",), r"(?s)hogwild needs workers that share.*threads"),
        (("launch.workers=threads", "parallel.shard=2"), r"(?s)threads carry the replicate axis"),
        (("parallel.shard=2",), r"(?s)threads share whole parameters.*shard to 1"),
        (("train.exact=true",), r"(?s)train.exact.*hogwild"),
        (("launch.workers=threads", "model.dropout=framework"), r"(?s)framework dropout"),
    ],
)
def test_what_hogwild_cannot_be(bench: Bench, overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        bench.train("parallel.replicate=2", HOGWILD, "launch.workers=auto", *overrides)
