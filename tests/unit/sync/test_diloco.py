"""Policies diloco and streaming-diloco: the outer step by torch's own SGD, on two replicas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from replicas import LAYOUT, drawn, on_replicas, policy_of
from shoal.comm.flat import FlatLayout, Span
from shoal.comm.group import Group
from shoal.comm.threads import Meeting, ThreadGroup
from shoal.config.sync import DiLoCo, Int8, StreamingDiLoCo
from shoal.errors import WorkerError
from shoal.sync.kinds import create
from shoal.sync.policy import Division, Given, Gradients
from shoal.sync.streaming_diloco import fragments_of

DOUBLE = torch.float64
TARGETS = (30, 10)
STEPS = 12
Moves = Sequence[Sequence[Tensor]]


def moves(rank: int) -> list[Tensor]:
    """What the inner optimizer does in each step, whatever the parameters are."""
    return [0.1 * drawn(100 * (rank + 1) + step, dtype=DOUBLE) for step in range(STEPS)]


def trained(section: Any, *, size: int = 2) -> list[list[Tensor]]:
    """Parameters of each replica after every step."""

    def body(rank: int, group: Group) -> list[Tensor]:
        values, after = drawn(0, dtype=DOUBLE), []
        policy = policy_of(section, group, values, steps=STEPS)
        for step, move in enumerate(moves(rank)):
            policy.before_step(step)
            values += move
            policy.after_step(step, targets=TARGETS[rank])
            after.append(values.clone())
        return after

    return on_replicas(size, body)


def by_torch(every: int, *, rate: float, momentum: float, nesterov: bool, size: int = 2) -> Tensor:
    """The same by torch.optim.SGD over the mean of what replicas moved by."""
    weights = [count / sum(TARGETS[:size]) for count in TARGETS[:size]]
    anchor = torch.nn.Parameter(drawn(0, dtype=DOUBLE))
    outer = torch.optim.SGD([anchor], lr=rate, momentum=momentum, nesterov=nesterov)
    for first in range(0, STEPS, every):
        ends = [
            anchor.detach() + torch.stack(moves(rank)[first : first + every]).sum(0)
            for rank in range(size)
        ]
        anchor.grad = sum(w * (anchor.detach() - end) for w, end in zip(weights, ends))
        outer.step()
    return anchor.detach()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.9, False), (0.0, False)])
def test_a_round_is_a_step_of_torchs_sgd(momentum: float, nesterov: bool, size: int) -> None:
    section = DiLoCo(every_steps=4, outer_momentum=momentum, nesterov=nesterov)
    wanted = by_torch(4, rate=0.7, momentum=momentum, nesterov=nesterov, size=size)
    for after in trained(section, size=size):
        torch.testing.assert_close(after[-1], wanted, rtol=1e-12, atol=1e-12)


def test_the_last_round_comes_with_the_last_step() -> None:
    first, second = trained(DiLoCo(every_steps=5))
    equal = [step + 1 for step in range(STEPS) if torch.equal(first[step], second[step])]
    assert equal == [5, 10, 12]


def test_one_fragment_without_delay_or_mix_is_diloco() -> None:
    """Up to the last step, where the end of the run sends it once more."""
    whole = trained(DiLoCo(every_steps=4))
    section = StreamingDiLoCo(every_steps=4, fragments=1, overlap_steps=0, own_share=0.0)
    for found, wanted in zip(trained(section), whole, strict=True):
        torch.testing.assert_close(found[:-1], wanted[:-1], rtol=1e-12, atol=1e-12)


def streamed(section: StreamingDiLoCo, parts: list[list[Span]]) -> list[Tensor]:
    """Parameters of two replicas after every step but the ending's, by torch's SGD per fragment."""
    masks = []
    for part in parts:
        mask = torch.zeros(LAYOUT.numel, dtype=torch.bool)
        for span in part:
            mask[span.start : span.stop] = True
        masks.append(mask)
    anchors = [torch.nn.Parameter(drawn(0, dtype=DOUBLE)[mask]) for mask in masks]
    outers = [torch.optim.SGD([each], lr=0.7, momentum=0.9, nesterov=True) for each in anchors]
    values = [drawn(0, dtype=DOUBLE) for _ in range(2)]
    every, share, flying, after = section.every_steps, section.own_share, {}, []
    for step in range(1, STEPS - len(parts) + 1):
        for rank in range(2):
            values[rank] += moves(rank)[step - 1]
        for p, mask in enumerate(masks):
            if p in flying and step == flying[p][0] + section.overlap_steps:
                anchors[p].grad = flying.pop(p)[1]
                outers[p].step()
                for each in values:
                    each[mask] = share * each[mask] + (1 - share) * anchors[p].detach()
            if (step - (p + 1) * every // len(parts)) % every == 0:
                moved = [anchors[p].detach() - each[mask] for each in values]
                flying[p] = (step, 0.75 * moved[0] + 0.25 * moved[1])
        after.append(torch.stack(values))
    return after


@pytest.mark.parametrize("overlap", [1, 2])
def test_fragments_meet_in_turn_while_steps_go_on(overlap: int) -> None:
    section = StreamingDiLoCo(every_steps=4, fragments=2, overlap_steps=overlap, own_share=0.25)
    parts = fragments_of(LAYOUT, numel=LAYOUT.numel, count=2)
    found = trained(section)
    for step, wanted in enumerate(streamed(section, parts)):
        got = torch.stack([after[step] for after in found])
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12, msg=f"step {step + 1}")
    assert torch.equal(found[0][-1], found[1][-1]), "the run ends with one model"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_fragments_cover_every_element_once_in_whole_blocks(count: int) -> None:
    parts = fragments_of(LAYOUT, numel=LAYOUT.numel, count=count)
    covered = sorted((span.start, span.stop) for part in parts for span in part)
    edges = [0, *(stop for _, stop in covered)]
    assert edges == [*(start for start, _ in covered), LAYOUT.numel]
    for number, part in enumerate(parts):
        for name, start in LAYOUT.offsets.items():
            block = next((int(word) for word in name.split(".") if word.isdigit()), None)
            inside = any(span.start <= start < span.stop for span in part)
            ends = {"model.embed.weight": 0, "model.norm.weight": count - 1}
            wanted = ends[name] if block is None else block % count
            assert inside == (wanted == number), name


@pytest.mark.parametrize(
    "section",
    [
        DiLoCo(every_steps=3, codec=Int8(error_feedback=True)),
        StreamingDiLoCo(every_steps=4, fragments=2, codec=Int8(error_feedback=True)),
        StreamingDiLoCo(every_steps=4, fragments=2, overlap_steps=2),
    ],
    ids=["diloco", "streaming-int8", "streaming"],
)
def test_what_is_kept_goes_on_as_if_nothing_had_been(section: Any) -> None:
    """Vectors and facts into new objects after every number of steps: the same bits at the end."""
    wanted = trained(section)

    def body(rank: int, group: Group) -> Tensor:
        values = drawn(0, dtype=DOUBLE)
        policy = policy_of(section, group, values, steps=STEPS)
        for step, move in enumerate(moves(rank)):
            policy.before_step(step)
            values += move
            policy.after_step(step, targets=TARGETS[rank])
            kept = {each.kind: each.tensor.clone() for each in policy.vectors()}
            facts, values = policy.facts(), values.clone()
            policy = policy_of(section, group, values, steps=STEPS)
            for each in policy.vectors():
                each.tensor.copy_(kept[each.kind])
            policy.restore(facts)
        return values

    for found, after in zip(on_replicas(2, body), wanted, strict=True):
        assert torch.equal(found, after[-1])


def test_parameters_that_are_not_finite_do_not_reach_the_others() -> None:
    def body(rank: int, group: Group) -> Tensor:
        values = drawn(0)
        policy = policy_of(DiLoCo(every_steps=1), group, values, steps=9)
        values += float("nan") if rank == 1 else 1.0
        policy.after_step(0, targets=1)
        ((name, fields),) = policy.notes()
        assert name == "round-dropped" and "go back to where the round began" in fields["text"]
        return values

    for values in on_replicas(2, body):
        assert torch.equal(values, drawn(0))


@pytest.mark.parametrize("kind", [DiLoCo, StreamingDiLoCo])
def test_a_round_that_a_lost_peer_prevents_is_made_up_for(kind: Any) -> None:
    more = {} if kind is DiLoCo else {"fragments": 1, "overlap_steps": 0, "own_share": 0.0}
    values = drawn(0)
    broken = Meeting(2, timeout_seconds=20)
    policy = policy_of(kind(every_steps=1, **more), ThreadGroup(broken, rank=0), values, steps=9)
    broken.fail("worker 1 is gone")
    values += 1.0
    with pytest.raises(WorkerError, match="worker 1 is gone"):
        policy.after_step(0, targets=5)
    moved = drawn(0) + 1.0
    assert torch.equal(values, moved), "nothing of the round was applied"
    before = policy.round
    alone = ThreadGroup(Meeting(1, timeout_seconds=20), rank=0)
    policy.enter(world=alone, peers=alone, inside=alone)
    policy.before_step(1)
    policy.before_step(1)
    wanted = drawn(0) + 0.7 * 1.9 * (moved - drawn(0))  # Nesterov, from rest
    torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-5)
    assert policy.round > before, "further than a rank that has not met"


def test_the_first_steps_are_taken_together() -> None:
    """Gradients of means over unequal numbers of targets add up to the mean over all."""

    def body(rank: int, group: Group) -> None:

        values = drawn(0)
        policy = policy_of(DiLoCo(every_steps=4, start_steps=2), group, values, steps=9)
        for step in range(3):
            policy.before_step(step)
            own = Gradients(drawn(rank), LAYOUT, targets=TARGETS[rank])
            reduced = policy.reduce(own)
            mean = 0.75 * drawn(0) + 0.25 * drawn(1)
            wanted = mean if step < 2 else drawn(rank)
            torch.testing.assert_close(reduced.values, wanted, rtol=1e-6, atol=1e-6)
            assert reduced.targets == (40 if step < 2 else None)
            values += 1.0
            policy.after_step(step, targets=TARGETS[rank])
            assert policy.equal_after(step + 1) == (step < 2)
        anchor = next(v for v in policy.vectors() if v.kind == "outer/anchor")
        torch.testing.assert_close(anchor.tensor, drawn(0) + 2.0)

    on_replicas(2, body)


def test_a_rank_without_blocks_of_a_fragment_sends_nothing_of_it() -> None:
    """As a stage of a pipeline that has every second block only."""
    layout = FlatLayout.of({"decay": {"model.layers.0.up.weight": (64, 24)}, "frozen": {}})

    def body(rank: int, group: Group) -> Tensor:
        values = torch.zeros(layout.numel)
        section = StreamingDiLoCo(every_steps=4, fragments=2, codec=Int8(error_feedback=True))
        policy = create(section, Given(Division(12, 1), values, layout, STEPS, seed=5))
        alone = ThreadGroup(Meeting(1, timeout_seconds=30), rank=0)
        policy.enter(world=group, peers=group, inside=alone)
        for step in range(STEPS):
            policy.before_step(step)
            values += rank
            policy.after_step(step, targets=1)
        assert policy.equal_after(STEPS) and float(values.max()) > 0
        return values

    first, second = on_replicas(2, body)
    assert torch.equal(first, second)
