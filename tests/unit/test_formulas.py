"""docs/design/formulas.md in float64: what the textbook writes and what the code computes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from replicas import on_replicas
from shoal.comm.flat import FlatLayout
from shoal.comm.threads import Meeting, ThreadGroup
from shoal.data.batch import micro_batches
from shoal.fields import IGNORED, Field
from shoal.sync.every_step import EveryStep
from shoal.sync.local_sgd import LocalSGD
from shoal.sync.policy import Division, Gradients, Policy
from shoal.tasks.losses import Summed, TokenCrossEntropy
from shoal.tasks.sequence_classification import _LOSSES
from shoal.tasks.task import Output

EXACT = 1e-12
N, D, WORKERS, RATE = 12, 5, 3, 0.3
LAYOUT = FlatLayout.of({"decay": {"w": (D,)}, "frozen": {}})


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Y = drawn(N, D), (drawn(N, seed=1) > 0).double()
Y[7:9] = IGNORED  # parts have 4, 3 and 3 targets


def textbook(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the binary cross entropies, and its gradient, both written out."""
    x, y = x[y != IGNORED], y[y != IGNORED]
    s = 1 / (1 + torch.exp(-(x @ w)))
    return -(y * s.log() + (1 - y) * (1 - s).log()).sum(), x.T @ (s - y)


def coded(x: Tensor, y: Tensor, w: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The same from the task's own loss, and autograd."""
    w = w.clone().requires_grad_()

    def losses(hidden: Tensor, fields: object) -> Tensor:
        return _LOSSES["binary"]((hidden @ w)[:, None], y)

    total = Output(x, {"labels": y}, Summed(losses)).total(scale=scale)
    (gradient,) = torch.autograd.grad(total * scale, w)
    return total.detach(), gradient


def shares(size: int = WORKERS) -> list[slice]:
    found = [Division(N, 1).share(rank, size) for rank in range(size)]
    return [slice(each.start, each.stop) for each in found]


def targets(part: slice) -> int:
    return int((Y[part] != IGNORED).sum())


def test_binary_cross_entropy_and_its_gradient() -> None:
    w = drawn(D, seed=2)
    for found, wanted in zip(coded(X, Y, w), textbook(X, Y, w)):
        torch.testing.assert_close(found, wanted, rtol=EXACT, atol=EXACT)


def test_it_does_not_overflow_where_the_textbooks_does() -> None:
    """s(z) is 1 in float64 from z = 37 on, so log(1 - s) is minus infinity; the loss is z."""
    z, y = torch.tensor([[800.0], [-800.0]], dtype=torch.float64), torch.tensor([0.0, 1.0])
    assert _LOSSES["binary"](z, y).tolist() == [800.0, 800.0]


def test_softmax_cross_entropy_and_its_gradient() -> None:
    z, y = drawn(6, 4, seed=3).requires_grad_(), torch.tensor([0, 3, 1, 1, 2, 0])
    loss = TokenCrossEntropy(lambda hidden: hidden).total(Output(z, {"labels": y}, None))  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss, z)
    p = z.exp() / z.exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(loss, -p[torch.arange(6), y].log().sum(), rtol=EXACT, atol=EXACT)
    wanted = p - torch.nn.functional.one_hot(y, 4)
    torch.testing.assert_close(gradient, wanted, rtol=EXACT, atol=EXACT)


def test_the_risk_is_the_sum_over_sub_batches() -> None:
    """By micro batches and by shares; the mean of means is another number."""
    w = drawn(D, seed=2)
    n = targets(slice(0, N))
    whole, gradient = (each / n for each in textbook(X, Y, w))
    fields = {"x": Field("float32", (D,)), "labels": Field("float32", (), fill=IGNORED)}
    batch = {"x": X, "labels": Y, "sample_ids": torch.arange(N)}
    for rows in (1, 2, 5):
        micros = [micro for micro, _ in micro_batches(batch, fields, rows=rows)]
        parts = [coded(micro["x"], micro["labels"], w, scale=1 / n) for micro in micros]
        assert math.isclose(sum(float(part[0]) for part in parts) / n, whole, rel_tol=EXACT)
        torch.testing.assert_close(sum(p[1] for p in parts), gradient, rtol=EXACT, atol=EXACT)
    means = [float(coded(X[part], Y[part], w)[0]) / targets(part) for part in shares()]
    weighted = sum(targets(part) / n * mean for part, mean in zip(shares(), means))
    assert math.isclose(weighted, whole, rel_tol=EXACT)
    assert abs(sum(means) / WORKERS - float(whole)) > 1e-3


def entered(policy: Policy, group: ThreadGroup) -> Policy:
    alone = ThreadGroup(Meeting(1, timeout_seconds=20), rank=0)
    policy.enter(world=group, peers=group, inside=alone)
    return policy


def descended(steps: int, *, part: slice = slice(0, N)) -> Tensor:
    """Plain SGD of one model on a part, by the textbook."""
    w = drawn(D, seed=4)
    for _ in range(steps):
        w = w - RATE * textbook(X[part], Y[part], w)[1] / targets(part)
    return w


def averaged(steps: int) -> Tensor:
    """k models, merged once, by their targets."""
    n = targets(slice(0, N))
    return sum(targets(part) / n * descended(steps, part=part) for part in shares())


def test_every_step_is_the_step_of_one_worker_on_the_whole_batch() -> None:
    wanted, n = descended(4), targets(slice(0, N))
    found: list[Tensor] = [torch.empty(0)] * WORKERS

    def body(rank: int, group: ThreadGroup) -> None:
        policy = entered(EveryStep(Division(N, 1), bucket_bytes=1024), group)
        part, w = shares()[rank], drawn(D, seed=4)
        for step in range(4):
            flat = torch.zeros(LAYOUT.numel, dtype=torch.float64)
            LAYOUT.view(flat, "w").copy_(coded(X[part], Y[part], w, scale=1 / n)[1])
            reduced = policy.reduce(Gradients(flat, LAYOUT))
            whole = torch.zeros_like(flat)
            whole[reduced.span.start : reduced.span.stop] = reduced.values
            group.sum_(whole)  # threads each have a slice
            w = w - RATE * LAYOUT.view(whole, "w")
            policy.after_step(step, targets=n)
        found[rank] = w

    on_replicas(WORKERS, body)
    for each in found:
        torch.testing.assert_close(each, wanted, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("steps", [1, 5])
def test_local_sgd_is_k_models_merged_once(steps: int) -> None:
    wanted: Tensor = averaged(steps)
    found: list[Tensor] = [torch.empty(0)] * WORKERS

    def body(rank: int, group: ThreadGroup) -> None:
        part, flat = shares()[rank], torch.zeros(LAYOUT.numel, dtype=torch.float64)
        w = LAYOUT.view(flat, "w")
        w.copy_(drawn(D, seed=4))
        policy = LocalSGD(Division(N, 1), values=flat, every_steps=steps, steps=steps)
        entered(policy, group)
        for step in range(steps):
            w -= RATE * coded(X[part], Y[part], w, scale=1 / targets(part))[1]
            policy.after_step(step, targets=targets(part))
        found[rank] = w

    on_replicas(WORKERS, body)
    for each in found:
        torch.testing.assert_close(each, wanted, rtol=EXACT, atol=EXACT)


def test_the_two_are_one_for_a_single_step_only() -> None:
    apart: Sequence[float] = [
        float((averaged(steps) - descended(steps)).norm() / descended(steps).norm())
        for steps in (1, 5, 50)
    ]
    assert apart[0] < EXACT
    assert apart[1] > 1e-3 and apart[2] > apart[1], apart
