"""Layouts over hosts by made-up links: prices by hand, and the choice by brute force.

The oracle writes the formulas of docs/design/hosts.md out in closed form, for ranks that lie in
blocks; the planner counts bytes edge by edge.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from shoal.layout import Layout
from shoal.legal import facts_from_config
from shoal.plan.over_hosts import SUSTAINED, Hosts, Link, Price, choose, layouts, price
from shoal.plan.workload import Candidate, Workload, flops_per_token

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "tie_word_embeddings": True,
}
FACTS = facts_from_config(CONFIG)
WORK = Workload(facts=FACTS, sequence_tokens=128, global_batch_samples=32, precision="fp32")
INSIDE = Link(1e9, 20e-6)
SLOW, FAST = Link(2.5e6, 1e-3), Link(1e9, 20e-6)


def hosts(between: Link, *, count: int = 2, cores: int = 4) -> Hosts:
    return Hosts(count=count, cores=cores, flops_per_second=20e9, inside=INSIDE, between=between)


def by_hand(candidate: Candidate, at: Hosts, *, threads: int) -> float:
    """docs/design/hosts.md, for one block of ranks on each host; seconds."""
    layout, here = candidate.layout, candidate.layout.workers // at.count
    r, p, t = layout.replicate, layout.pipeline, layout.tensor
    m = WORK.global_batch_samples // r // candidate.micro_batch_samples
    each = flops_per_token(FACTS, sequence_tokens=WORK.sequence_tokens)
    speed = at.flops_per_second * SUSTAINED * threads
    compute = each * WORK.tokens / (layout.workers * speed)
    total = compute * (1 + (p - 1) / m)
    hidden = 4 * candidate.micro_batch_samples * WORK.sequence_tokens * FACTS.hidden
    far_rings = r >= at.count  # whole replicas on each host: rings of gradients cross
    if t > 1:
        calls = 10 * m * FACTS.layers / p
        # every rank of the host sends to its neighbour, over the memory that all share
        total += here * calls * hidden * (t - 1) / t / INSIDE.bytes_per_second
        total += calls * (t - 1) * INSIDE.seconds
    if p > 1:
        on_host = here // t if r < at.count else p  # stages of a replica on one host
        link, rounds = INSIDE if on_host >= p else at.between, 2 * (m + p - 1)
        inner = hidden / t * m * t  # of all ranks of a stage together
        if on_host >= p:
            seconds = here // (p * t) * 2 * (p - 1) * inner / INSIDE.bytes_per_second
        else:
            hosts_of_replica = p // on_host
            far = 2 if hosts_of_replica > 2 else 1  # one in the middle sends both ways
            near = 2 * (on_host - 1) * inner / INSIDE.bytes_per_second
            seconds = max(far * inner / at.between.bytes_per_second, near)
        total += seconds + rounds * link.seconds
    if r > 1:
        held = 4 * FACTS.parameters / (t * p)
        part = 2 * (r - 1) / r * held
        # each host holds r / hosts replicas; of every ring one edge leaves it, the rest stay
        stays = (r // at.count - 1) * p * t
        if far_rings:
            out, near = p * t * part, stays * part
            total += max(out / at.between.bytes_per_second, near / INSIDE.bytes_per_second)
            total += 2 * (r - 1) * at.between.seconds
    return total


def able(at: Hosts, *, threads: int) -> list[Candidate]:
    """Layouts of the mesh that put one block of ranks on each host; tensor inside of it."""
    here = max(1, at.cores // threads)
    found = []
    for r, p, t in itertools.product(range(1, 33), range(1, 9), (1, 2, 4)):
        if r * p * t == at.count * here and 32 % r == 0 and here % t == 0:
            whole = r % at.count == 0 or (r == 1 and p % at.count == 0)
            if whole and 32 // r >= p:
                found.append(Candidate(layout=Layout(replicate=r, pipeline=p, tensor=t)))
    return found


@pytest.mark.parametrize("between", [SLOW, FAST])
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("count", [2, 4])
def test_prices_are_those_of_the_formulas(between: Link, threads: int, count: int) -> None:
    at = hosts(between, count=count)
    tried = able(at, threads=threads)
    assert len(tried) >= 2
    for candidate in tried:
        found = price(candidate, workload=WORK, hosts=at, threads=threads)
        wanted = by_hand(candidate, at, threads=threads)
        assert found.step_seconds == pytest.approx(wanted, rel=1e-9), candidate.layout


def chosen(at: Hosts, *, threads: int, fixed: dict[str, int] | None = None) -> list[Price]:
    found = layouts(WORK, hosts=at, fixed=fixed or {}, threads=threads)
    tried = [Candidate(layout=each) for each in found if 32 % each.replicate == 0]
    return choose(tried, workload=WORK, hosts=at, fits=lambda each: True, threads=threads)


@pytest.mark.parametrize("between", [SLOW, FAST])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_choice_is_the_best_of_all_layouts(between: Link, threads: int) -> None:
    at = hosts(between)
    tried = able(at, threads=threads)
    best = min(tried, key=lambda each: by_hand(each, at, threads=threads))
    found = chosen(at, threads=threads)
    assert {each.candidate.layout for each in found} >= {each.layout for each in tried}
    assert found[0].step_seconds == pytest.approx(by_hand(best, at, threads=threads), rel=1e-9)


def test_tensor_stays_inside_a_host_whatever_the_link() -> None:
    for between, threads in itertools.product([SLOW, FAST], [1, 2, 4]):
        at = hosts(between)
        for each in chosen(at, threads=threads):
            places = at.places(each.candidate.layout)
            for ranks in each.candidate.layout.groups("tensor"):
                assert len({places[rank] for rank in ranks}) == 1
    assert chosen(hosts(SLOW), threads=1, fixed={"tensor": 8}) == []


def test_a_slow_cable_is_crossed_by_what_sends_least() -> None:
    """Few tokens: hidden states are less than gradients. Many: the other way round."""
    (few, *_) = chosen(hosts(SLOW), threads=4)
    assert few.candidate.layout == Layout(pipeline=2)
    assert few.between_bytes == 32 * 128 * 64 * 4, "every token's hidden state once"
    many = replace(WORK, sequence_tokens=2048)
    at = hosts(SLOW)
    tried = [Candidate(layout=each) for each in layouts(many, hosts=at, fixed={}, threads=4)]
    (best, *_) = choose(tried, workload=many, hosts=at, fits=lambda each: True, threads=4)
    assert best.candidate.layout == Layout(replicate=2)
    assert best.between_bytes == 4 * FACTS.parameters, "gradients out and sums back, half each"


def test_what_does_not_fit_is_not_chosen() -> None:
    at = hosts(SLOW)
    tried = [Candidate(layout=each) for each in layouts(WORK, hosts=at, fixed={}, threads=4)]
    whole = {each.layout.pipeline for each in tried}
    assert whole == {1, 2}
    found = choose(tried, workload=WORK, hosts=at, fits=lambda each: each.layout.pipeline == 1)
    assert [each.candidate.layout for each in found] == [Layout(replicate=2)]


def test_threads_beyond_the_cores_are_no_faster() -> None:
    at, candidate = hosts(FAST), Candidate(layout=Layout(replicate=2))
    one = price(candidate, workload=WORK, hosts=at, threads=4)
    more = price(candidate, workload=WORK, hosts=at, threads=16)
    half = price(candidate, workload=WORK, hosts=at, threads=2)
    assert more.seconds["compute"] == one.seconds["compute"] == half.seconds["compute"] / 2
    assert at.threads(Layout(replicate=4)) == 2 and at.threads(Layout(replicate=16)) == 1


def test_policies_that_meet_seldom_pay_seldom() -> None:
    often = Candidate(layout=Layout(replicate=2))
    seldom = replace(often, policy="local-sgd", every_steps=10)
    every, tenth = (price(each, workload=WORK, hosts=hosts(SLOW)) for each in (often, seldom))
    assert every.seconds["replicate"] == pytest.approx(10 * tenth.seconds["replicate"])
