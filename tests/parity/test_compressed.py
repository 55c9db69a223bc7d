"""Policies and codecs by the product's own loop: over cut replicas, over stops, and each other."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from shoal.checkpoint.store import Store
from shoal.engine.job import Instruments
from shoal.launch import local
from shoal.prove.recording import Recording
from tiny import Bench, Run

TWO = ("parallel.replicate=2", "launch.workers=processes", "train.evaluate_every_steps=0")
slow = pytest.mark.slow
CODECS = {
    "bf16": ("{kind: bf16}", 0.01),
    "fp16": ("{kind: fp16}", 0.001),
    "int8": ("{kind: int8}", 0.03),
    "int4": ("{kind: int4, error_feedback: false}", 0.4),
    "topk": ("{kind: topk, fraction: 1.0}", 1e-5),
    "powersgd": ("{kind: powersgd, rank: 16, error_feedback: false}", 0.7),
}
"""A codec, and how far its sum may be from the true one, over the length of that."""
CUTS = {"whole": "", "shard": "shard: 2", "tensor": "tensor: 2", "pipeline": "pipeline: 2"}
POLICIES = {
    "diloco": "sync={kind: diloco, every_steps: 3, codec: {kind: int8, error_feedback: true}}",
    "streaming": "sync={kind: streaming-diloco, every_steps: 4, codec: {kind: int8}}",
    "local-sgd": "sync={kind: local-sgd, every_steps: 3, start_steps: 2}",
    "gossip": "sync={kind: gossip, meet_every_steps: 3}",
    "topk": "sync={kind: every-step, codec: {kind: topk}}",
}


def recorded(bench: Bench, *overrides: str) -> Recording:
    """A run that keeps the summed gradients of every step."""
    out = bench.new_path()
    local.train(
        bench.recipe,
        overrides,
        out=out,
        console=False,
        pool=bench.pool,
        instruments=Instruments(record=True),
    )
    return Recording(out)


@pytest.mark.parametrize(
    ("cut", "codec"),
    [
        ("whole", "int8"),
        *(
            pytest.param(cut, codec, marks=slow)
            for cut in CUTS
            for codec in CODECS
            if (cut, codec) != ("whole", "int8")
        ),
    ],
)
def test_the_first_sum_over_cut_replicas_is_near_that_of_one_worker(
    bench: Bench, cut: str, codec: str
) -> None:
    """Of the first step, where all hold the same weights; compared in float64."""
    text, largest = CODECS[codec]
    degrees = f"parallel={{replicate: 2, {CUTS[cut]}}}" if CUTS[cut] else "parallel.replicate=2"
    how = (degrees, "launch.workers=processes", "train.evaluate_every_steps=0", "train.steps=1")
    how = (*how, "train.micro_batch_samples=4")
    found = recorded(bench, *how, f"sync.codec={text}").step(0)
    wanted = recorded(bench, *how[2:], "parallel.replicate=1").step(0)
    apart = length = 0.0
    for name in wanted.names("gradient"):
        true = wanted.read(name, kind="gradient").double()
        apart += float((found.read(name, kind="gradient").double() - true).square().sum())
        length += float(true.square().sum())
    assert apart**0.5 < largest * length**0.5
    assert codec == "topk" or apart > 1e-12 * length, "something was compressed"


@slow
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_runs_over_cut_replicas(bench: Bench, name: str, cut: str) -> None:
    """Hashes are compared at every meeting, and the run ends with one model that was learned."""
    degrees = f"parallel={{replicate: 2, {CUTS[cut]}}}" if CUTS[cut] else "parallel.replicate=2"
    how = (degrees, "launch.workers=processes", "train.steps=12", "train.micro_batch_samples=4")
    run = bench.run(*how, POLICIES[name])
    assert Store(run.path / "checkpoints").open(12).names("parameter")
    uncut = bench.run("parallel.replicate=2", *how[1:], POLICIES[name])
    pairs = list(zip(run.losses, uncut.losses, strict=True))
    # what is rounded or left out is a rank's own part, so codecs see other blocks
    exact = "codec" not in POLICIES[name]
    assert max(abs(a / b - 1) for a, b in pairs) < (1e-4 if exact else 0.02)


@pytest.mark.parametrize(
    "name", ["diloco", *(pytest.param(n, marks=slow) for n in POLICIES if n != "diloco")]
)
def test_a_run_goes_on_as_if_it_had_not_stopped(bench: Bench, name: str) -> None:
    """Stopped within a round: outer state, what is on its way and error memory are kept."""
    how = (*TWO, "train.steps=16", POLICIES[name])
    straight = bench.run(*how)
    run = bench.train(*how, "train.stop_after_steps=7")
    bench.resume(run)
    assert run.weights == straight.weights and run.digits == straight.digits


@slow
@pytest.mark.parametrize("name", POLICIES)
def test_another_number_of_replicas_goes_on(bench: Bench, name: str) -> None:
    how = (*TWO, "train.steps=16", POLICIES[name])
    run = bench.train(*how, "train.stop_after_steps=7")
    before = Store(run.path / "checkpoints").open(7)
    errors = [kind for kind in ("error/gradient@0", "error/outer@0") if before.names(kind)]
    bench.resume(run, "parallel.replicate=4", "train.stop_after_steps=8")
    after = Store(run.path / "checkpoints").open(8)
    assert all(after.names(kind[:-1] + "3") for kind in errors)
    bench.resume(run, "parallel.replicate=4")
    assert len(run.losses) == 16 and run.losses[-1] < run.losses[0]


@slow
def test_a_checkpoint_of_every_step_goes_on_under_another_policy(bench: Bench) -> None:
    run = bench.train(*TWO, "train.steps=16", "train.stop_after_steps=4")
    bench.resume(run, "sync={kind: diloco, every_steps: 4}", "train.stop_after_steps=10")
    assert Store(run.path / "checkpoints").open(10).names("outer/momentum")
    bench.resume(run, "sync={kind: every-step, codec: {kind: int4}}")
    assert len(run.losses) == 16 and run.losses[-1] < run.losses[0]


def test_diloco_with_plain_steps_and_a_plain_outer_one_is_every_step(bench: Bench) -> None:
    """H = 1, outer rate 1, no momentum, inner SGD: the step over the global batch."""
    sgd = ("train.optimizer={kind: sgd, learning_rate: 0.05}", "train.max_gradient_norm=null")
    how = (*TWO, *sgd, "train.steps=12")
    wanted = bench.run(*how)
    plain = "every_steps: 1, outer_learning_rate: 1.0, outer_momentum: 0.0, nesterov: false"
    found = bench.run(*how, f"sync={{kind: diloco, {plain}}}")
    ours, theirs = (weights(run) for run in (found, wanted))
    for name, wanted_values in theirs.items():
        apart = (ours[name] - wanted_values).abs().max() / wanted_values.abs().max()
        assert float(apart) < 1e-6, name


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.path / "model" / "model.safetensors")


@slow
def test_one_replica_runs_diloco(bench: Bench) -> None:
    run = bench.run("parallel.replicate=1", "train.steps=12", "sync={kind: diloco, every_steps: 4}")
    assert len(run.losses) == 12 and run.losses[-1] < run.losses[0]
