"""A run that was stopped and resumed ends as the run that was not: same digits, same weights."""

from __future__ import annotations

import shutil

import pytest

from shoal.data.verify import verify_run
from shoal.environment import cache_directory
from shoal.errors import ConfigError, RunError
from tiny import Bench, Run, largest_difference

LENGTH = ("train.steps=20", "train.evaluate_every_steps=5", "checkpoint.every_steps=5")
GPT2 = (
    "model={kind: config, architecture: gpt2, n_embd: 32, n_layer: 2, n_head: 4, n_positions: 64,"
    " embd_pdrop: 0.2, resid_pdrop: 0.2, attn_pdrop: 0.2}",
)
MUON = ("train.optimizer={kind: muon, learning_rate: 0.02, adamw_learning_rate: 3.0e-3}",)
THREADS = ("parallel.replicate=2", "launch.workers=threads")
PROCESSES = ("parallel.replicate=2", "launch.workers=processes")


def halves(bench: Bench, *change: str, second: tuple[str, ...] = ()) -> Run:
    """10 steps, then the other 10 (with the overrides `second`)."""
    run = bench.train(*LENGTH, *change, "train.stop_after_steps=10")
    assert len(run.losses) == 10
    return bench.resume(run, *second)


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    "change",
    [(), THREADS, PROCESSES, MUON, GPT2],
    ids=["one", "threads", "processes", "muon", "gpt2"],
)
def test_ten_and_ten_is_twenty(bench: Bench, change: tuple[str, ...]) -> None:
    straight, resumed = bench.run(*LENGTH, *change), halves(bench, *change)
    assert resumed.digits == straight.digits
    assert resumed.weights == straight.weights
    assert resumed.events.count("resumed") == 1
    report = verify_run(resumed.path)
    assert (report.problems, report.num_steps, report.num_restarts) == ([], 20, 1)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((), ("parallel.replicate=4", "launch.workers=processes")),
        (PROCESSES, THREADS),
        (THREADS, ("parallel.replicate=1", "launch.workers=processes")),
    ],
    ids=["1-4 processes", "processes-threads", "2 threads-1"],
)
def test_resumed_at_another_degree_and_kind(
    bench: Bench, first: tuple[str, ...], second: tuple[str, ...]
) -> None:
    straight, resumed = bench.run(*LENGTH), halves(bench, *first, second=second)
    # float32: another order of the same sums (see parity/test_replicas)
    assert largest_difference(resumed.losses, straight.losses) < 1e-5
    assert verify_run(resumed.path).problems == []


def test_exact_mode_resumes_at_another_degree_with_the_same_bits(bench: Bench) -> None:
    exact = ("train.exact=true",)
    straight = bench.run(*LENGTH, *exact)
    resumed = halves(bench, *exact, second=("parallel.replicate=4", "launch.workers=threads"))
    assert resumed.digits == straight.digits
    assert resumed.weights == straight.weights


def test_a_resume_asks_whether_the_model_is_right_still(bench: Bench) -> None:
    """Its decision is kept, but transformers may be another by now: what is known of it is gone."""
    run = bench.train("train.steps=4", "train.stop_after_steps=2", "checkpoint.every_steps=2")
    known = cache_directory() / "examined"
    assert list(known.iterdir())
    shutil.rmtree(known)
    bench.resume(run)
    assert len(list(known.iterdir())) == 1


def test_a_damaged_checkpoint_is_passed_over_and_noted(bench: Bench) -> None:
    straight = bench.run(*LENGTH)
    run = bench.train(*LENGTH, "train.stop_after_steps=10")
    path = run.path / "checkpoints/step-00000010/rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    bench.resume(run)
    assert run.digits == straight.digits
    assert run.weights == straight.weights
    assert "checkpoint-damaged" in run.events and "redone" in run.events
    report = verify_run(run.path)
    assert (report.problems, report.num_steps) == ([], 20)


def test_a_run_whose_checkpoints_are_all_damaged(bench: Bench) -> None:
    run = bench.train(*LENGTH, "train.stop_after_steps=10")
    for path in run.path.glob("checkpoints/*/manifest.json"):
        path.write_text("{}")
    with pytest.raises(RunError, match=r"no checkpoint can be trusted(.|\n)*step-00000005"):
        bench.resume(run)
    assert len(run.losses) == 10, "nothing was cut or written over"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=4", "seed"),
        ("train.global_batch_samples=8", "train.global_batch_samples"),
        ("model.num_hidden_layers=3", "model.num_hidden_layers"),
        ("data.sequence_tokens=16", "data.sequence_tokens"),
        ("train.exact=true", "train.exact"),
    ],
)
def test_what_may_not_change(bench: Bench, override: str, key: str) -> None:
    run = bench.run(*LENGTH, "train.stop_after_steps=10")
    before = {path: path.read_bytes() for path in run.path.glob("*.*")}
    with pytest.raises(ConfigError, match=f"{key}: cannot change in a run that goes on") as problem:
        bench.resume(run, override)
    assert "start a new run for other values" in str(problem.value)
    assert {path: path.read_bytes() for path in run.path.glob("*.*")} == before


def test_a_checkpoint_of_another_model(bench: Bench) -> None:
    """A checkpoint folder copied from elsewhere is refused by name, before a step is taken."""
    run = bench.train(*LENGTH, "train.stop_after_steps=10")
    other = bench.train(*LENGTH, *GPT2, "train.stop_after_steps=15")
    source = other.path / "checkpoints/step-00000015"
    source.rename(run.path / "checkpoints" / source.name)
    with pytest.raises(
        RunError, match=r"model\.architecture.* differs from the run that was saved"
    ):
        bench.resume(run)
    assert len(run.losses) == 10


def test_another_optimizer_is_refused_by_name(bench: Bench) -> None:
    run = bench.run(*LENGTH, "train.stop_after_steps=10")
    with pytest.raises(RunError, match=r"momentum_buffer.*train\.optimizer\.kind"):
        bench.resume(run, *MUON)
    assert "kind: adamw" in (run.path / "config.yaml").read_text(), "the recipe stays as it was"


def test_a_longer_run_keeps_what_it_was_told(bench: Bench) -> None:
    run = bench.train("train.steps=6", "checkpoint.every_steps=3")
    bench.resume(run, "train.steps=9", "train.schedule={kind: constant}")
    assert len(run.losses) == 9
    assert "steps: 9" in (run.path / "config.yaml").read_text()
    assert run.rows[-1]["step"] == 9
