"""Policies by the product's own loop: what each must equal, and what a run under it keeps."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from shoal.checkpoint.store import Store
from shoal.data.verify import verify_run
from shoal.errors import ConfigError
from tiny import Bench, Run

TWO_PROCESSES = ("parallel.replicate=2", "launch.workers=processes")

SGD = (
    "train.optimizer={kind: sgd, learning_rate: 0.05}",
    "train.max_gradient_norm=null",
    "train.steps=20",
)
LOCAL = "sync={kind: local-sgd, every_steps: %d}"


def largest_difference(found: Run, wanted: Run) -> float:
    """Over all exported weights, relative to the largest of each tensor."""
    ours, theirs = (load_file(run.path / "model" / "model.safetensors") for run in (found, wanted))
    assert ours.keys() == theirs.keys()
    pairs = [(ours[name], theirs[name]) for name in theirs]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def test_local_sgd_every_step_is_the_step_over_the_global_batch(bench: Bench) -> None:
    """H = 1 and plain SGD: the mean weighted by targets is the update by the summed gradient."""
    wanted = bench.run(*TWO_PROCESSES, *SGD)
    found = bench.run(*TWO_PROCESSES, *SGD, LOCAL % 1)
    assert largest_difference(found, wanted) < 1e-6
    apart = bench.run(*TWO_PROCESSES, *SGD, LOCAL % 5)
    assert 1e-6 < largest_difference(apart, wanted) < 0.1, "replicas went their own ways"


def test_a_run_under_local_sgd_goes_on_as_if_it_had_not_stopped(bench: Bench) -> None:
    """Stopped within a round: each replica has saved parameters and moments of its own."""
    how = (*TWO_PROCESSES, "train.steps=20", "train.evaluate_every_steps=0", LOCAL % 8)
    straight = bench.run(*how)
    run = bench.train(*how, "train.stop_after_steps=11")
    saved = Store(run.path / "checkpoints").open(11)
    assert not saved.names("parameter") and not saved.names("exp_avg")
    for kind in ("parameter", "exp_avg", "exp_avg_sq"):
        assert saved.names(f"{kind}@0") == saved.names(f"{kind}@1") != []
    bench.resume(run)
    assert run.weights == straight.weights and run.digits == straight.digits
    last = Store(run.path / "checkpoints").open(20)
    assert last.names("parameter"), "the last step ends with a round: one model for all"


def test_another_number_of_replicas_starts_from_the_mean(bench: Bench) -> None:
    how = (*TWO_PROCESSES, "train.steps=20", "train.evaluate_every_steps=0", LOCAL % 8)
    run = bench.train(*how, "train.stop_after_steps=11")
    bench.resume(run, "parallel.replicate=1", "train.stop_after_steps=12")
    saved = Store(run.path / "checkpoints")
    before, after = saved.open(11), saved.open(12)
    name = before.names("parameter@0")[0]
    mean = (before.read(name, kind="parameter@0") + before.read(name, kind="parameter@1")) / 2
    moved = (after.read(name) - mean).abs().max()
    assert float(moved) < 0.01, "one step away from the mean"


def test_threads_share_their_parameters_and_cannot_go_their_own_ways(bench: Bench) -> None:
    with pytest.raises(ConfigError, match=r"(?s)local-sgd.*processes"):
        bench.train("parallel.replicate=2", "launch.workers=threads", LOCAL % 4)


def test_what_replicas_read_by_themselves_is_accounted_for(bench: Bench) -> None:
    """Also over a stop within a round: every sample once, as under every-step."""
    run = bench.train(*TWO_PROCESSES, "train.steps=20", LOCAL % 8, "train.stop_after_steps=11")
    bench.resume(run)
    report = verify_run(run.path)
    assert (report.num_steps, report.problems) == (20, [])


GROUPS = "kind: local-sgd, every_steps: 2, group_replicas: 2, outer_every_steps: 8"


@pytest.mark.slow
def test_groups_of_replicas_agree_more_often_than_all(bench: Bench) -> None:
    """Four replicas, two of each host: rows say how much went to which."""
    how = ("parallel.replicate=4", "launch.workers=processes", "train.micro_batch_samples=2")
    how = (*how, "train.steps=20", "train.evaluate_every_steps=0", "sync.verify_every_steps=0")
    run = bench.train(*how, f"sync={{{GROUPS}}}", "train.stop_after_steps=11")
    bench.resume(run)
    straight = bench.run(*how, f"sync={{{GROUPS}}}")
    assert run.weights == straight.weights and run.digits == straight.digits
    links = [row["sent_bytes_by_link"] for row in straight.rows if "loss" in row]
    plain = bench.run(*how, "sync={kind: local-sgd, every_steps: 2}")
    everywhere = [row["sent_bytes_by_link"] for row in plain.rows if "loss" in row]
    near, far = (sum(each.get(f"replica {r}", 0) for each in links) for r in (1, 2))
    assert 4 * far < near, "between groups: three averages of a half, not ten of the whole"
    assert near + far < sum(sum(each.values()) for each in everywhere)
    assert not verify_run(straight.path).problems


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
def test_gradients_may_be_summed_in_groups_first(bench: Bench, exact: bool) -> None:
    """Exact: the same bits. Else within rounding. Less crosses between groups in both."""
    how = ("parallel.replicate=4", "launch.workers=processes", "train.micro_batch_samples=2")
    how = (*how, "train.steps=10", "train.evaluate_every_steps=0", f"train.exact={exact}")
    once = bench.run(*how)
    grouped = bench.run(*how, "sync={kind: every-step, group_replicas: 2}")
    assert grouped.losses == pytest.approx(once.losses, abs=1e-5)
    if exact:
        assert grouped.weights == once.weights and grouped.losses == once.losses

    def sent(run: Run) -> int:
        """By replica 0 to those of the other group."""
        links = [row["sent_bytes_by_link"] for row in run.rows if "loss" in row]
        return sum(each.get(f"replica {r}", 0) for each in links for r in (2, 3))

    assert 0 < sent(grouped) < sent(once)


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        ("kind: local-sgd, group_replicas: 2", "go together: set both"),
        (
            "kind: local-sgd, every_steps: 4, group_replicas: 2, outer_every_steps: 6",
            "a multiple of `every_steps`, above it; got 6 and 4",
        ),
        (
            "kind: local-sgd, every_steps: end, group_replicas: 2, outer_every_steps: 6",
            "a multiple of `every_steps`, above it; got 6 and end",
        ),
        (GROUPS, "2 replicas are no two or more groups of 2"),
        ("kind: every-step, group_replicas: 2", "2 replicas are no two or more groups of 2"),
        ("kind: every-step, group_replicas: 2, codec: {kind: int8}", "sums floats: leave it out"),
    ],
)
def test_groups_that_cannot_be_are_refused(bench: Bench, section: str, wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        bench.train(*TWO_PROCESSES, f"sync={{{section}}}")
    assert wanted in str(caught.value)
