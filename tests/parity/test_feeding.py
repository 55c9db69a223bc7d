"""What a run reads: epochs, weighted mixtures with the loss of each source, and the proof of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.data.verify import verify_run
from tiny import Bench, largest_difference, write_corpus

CURVE = 1e-5


@pytest.fixture(scope="module")
def mixture(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    second = write_corpus(tmp_path_factory.mktemp("mixture") / "other.jsonl", seed=9, documents=90)
    sources = f"data.source=[{{source: {bench.corpus}, weight: 3}}, {{source: {second}}}]"
    return (sources, "train.steps=12", "train.evaluate_every_steps=6")


def test_a_mixture_has_the_loss_of_each_source(bench: Bench, mixture: tuple[str, ...]) -> None:
    run = bench.run(*mixture)
    for row in run.evaluations:
        parts = {key: row[key] for key in row if key.startswith("evaluation_loss/")}
        assert len(parts) == 2
        assert min(parts.values()) < row["evaluation_loss"] < max(parts.values())


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_a_mixture_in_two_replicas(bench: Bench, mixture: tuple[str, ...], kind: str) -> None:
    one = bench.run(*mixture)
    two = bench.run(*mixture, "parallel.replicate=2", f"launch.workers={kind}")
    assert largest_difference(two.losses, one.losses) < CURVE
    for key in one.evaluations[0]:
        if key.startswith("evaluation_loss"):
            pair = ([row[key] for row in run.evaluations] for run in (two, one))
            assert largest_difference(*pair) < CURVE


def test_epochs_set_the_number_of_steps(bench: Bench) -> None:
    change = ("train.steps=null", "train.epochs=1", "train.global_batch_samples=64")
    run = bench.run(*change)
    report = verify_run(run.path)
    assert report.problems == []
    (epochs,) = report.epochs.values()
    # whole steps only: the last one may go over the end of the epoch, by less than a batch
    assert 1.0 <= epochs < 1.0 + 1 / report.num_steps + 1e-9
    assert len(run.losses) == report.num_steps


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_no_sample_is_lost_or_doubled(bench: Bench, kind: str) -> None:
    run = bench.run("parallel.replicate=4", f"launch.workers={kind}")
    report = verify_run(Path(run.path))
    assert report.problems == []
    assert (report.num_steps, report.num_samples) == (30, 30 * 16)
