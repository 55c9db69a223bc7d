"""The search: exact on small spaces, quick on large ones, and close to what experts chose."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from planner_score.profiles import MEGATRON, MEGATRON_CLASSIC
from shoal.errors import UserError
from shoal.layout import Layout
from shoal.legal import Combination, ModelFacts, facts_from_config
from shoal.legal.rules import illegal
from shoal.plan import explain
from shoal.plan.cost.step import Estimator
from shoal.plan.hardware import parse_cluster
from shoal.plan.search import (
    Space,
    _candidates,
    choose,
    find,
    layouts,
    offers,
)
from shoal.plan.software import SHOAL, Software
from shoal.plan.workload import Candidate, Workload


def llama(hidden: int, layers: int, heads: int, groups: int, inner: int, tied: bool = False):
    return facts_from_config(
        {
            "model_type": "llama",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "intermediate_size": inner,
            "vocab_size": 128256,
            "tie_word_embeddings": tied,
        }
    )


def gpt(hidden: int, layers: int, heads: int, vocabulary: int) -> ModelFacts:
    return facts_from_config(
        {
            "model_type": "gpt2",
            "n_embd": hidden,
            "n_layer": layers,
            "n_head": heads,
            "vocab_size": vocabulary,
            "n_positions": 2048,
        }
    )


LARGE = llama(16384, 126, 128, 8, 53248)
EIGHT = llama(4096, 32, 32, 8, 14336)
ONE = llama(2048, 16, 32, 8, 8192, tied=True)


def estimator_of(
    facts: ModelFacts, cluster: str, *, row: int, batch: int, software: Software = SHOAL
) -> Estimator:
    workload = Workload(facts=facts, sequence_tokens=row, global_batch_samples=batch)
    return Estimator(workload, parse_cluster(cluster), software)


@pytest.mark.parametrize("cluster", ["8xA100-40", "2x4xH100", "3x2xV100-32"])
@pytest.mark.parametrize("software", [SHOAL, MEGATRON_CLASSIC])
def test_nothing_is_lost_against_brute_force(cluster: str, software: Software) -> None:
    """Predicting every candidate with every recompute kind finds no faster plan that fits."""
    estimator = estimator_of(ONE, cluster, row=4096, batch=24, software=software)
    space = Space()
    best = float("inf")
    for layout in layouts(ONE, cluster=estimator.cluster, workload=estimator.workload, space=space):
        asked = Combination(layout=layout, num_workers=estimator.cluster.workers)
        assert illegal(asked.of_model(ONE)) == []
        for candidate in _candidates(layout, workload=estimator.workload, space=space):
            for recompute in ("none", "selective", "full"):
                tried = replace(candidate, recompute=recompute)
                if estimator.fits(tried, headroom=space.headroom):
                    best = min(best, estimator.predict(tried).step_seconds)
    assert find(estimator).best.step_seconds == best


@pytest.mark.timed
def test_405b_on_4096_devices_within_a_second() -> None:
    """The measure of the issue; half a second on one of two shared cores when written.

    In a process of its own, as a user runs it: here the garbage collector walks all that the other
    tests have imported. The best of three: a neighbour on the same core makes any of them longer.
    """
    script = (
        "import time; from unit.plan.test_plan_search import *;"
        "estimator = estimator_of(LARGE, '512x8xH100', row=8192, batch=2048, software=MEGATRON);"
        "started = time.process_time(); find(estimator); print(time.process_time() - started)"
    )
    command = [sys.executable, "-c", script]
    said = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(each.stdout) for each in said) < 1.0
    found = find(estimator_of(LARGE, "512x8xH100", row=8192, batch=2048, software=MEGATRON))
    assert found.examined > 1000
    assert found.best.fits


# A fused SwiGLU keeps gate and up only and makes their product again in its backward, as that of
# xformers, Meta's own library, does (_SwiGLUFusedFunc).
META = replace(MEGATRON, name="meta", recomputes_gate=True)

PRODUCTION = [
    # Llama 3 405B: tensor 8, pipeline 16, data 128 (arXiv 2407.21783, table 4).
    (
        LARGE,
        "2048x8xH100",
        8192,
        2048,
        META,
        Candidate(
            layout=Layout(shard=128, tensor=8, pipeline=16),
            schedule="interleaved-1f1b",
            chunks=4,
            level="optimizer",
        ),
    ),
    # MT-NLG 530B: tensor 8, pipeline 35, data 8 (arXiv 2201.11990, section 5).
    (
        gpt(20480, 105, 128, 51200),
        "280x8xA100",
        2048,
        1920,
        MEGATRON_CLASSIC,
        Candidate(
            layout=Layout(replicate=8, tensor=8, pipeline=35), recompute="full", level="optimizer"
        ),
    ),
    # BLOOM 176B: tensor 4, pipeline 12, data 8 (arXiv 2211.05100, section 3.4).
    (
        gpt(14336, 70, 112, 250880),
        "48x8xA100",
        2048,
        2048,
        MEGATRON_CLASSIC,
        Candidate(
            layout=Layout(shard=8, tensor=4, pipeline=12),
            micro_batch_samples=2,
            recompute="full",
            level="optimizer",
        ),
    ),
]


@pytest.mark.parametrize(("facts", "cluster", "row", "batch", "software", "used"), PRODUCTION)
def test_published_layouts_are_within_reach(
    facts: ModelFacts, cluster: str, row: int, batch: int, software: Software, used: Candidate
) -> None:
    """What the team ran fits by our reckoning and is never faster than what we recommend.

    Utilisation of the three was 0.41, 0.36 and 0.48.
    """
    estimator = estimator_of(facts, cluster, row=row, batch=batch, software=software)
    theirs = estimator.predict(used)
    ours = find(estimator).best
    assert theirs.fits
    assert ours.step_seconds <= theirs.step_seconds
    assert 0.25 < theirs.mfu < 0.65


def test_small_models_get_what_an_expert_would_pick() -> None:
    """A 7B on one node is sharded, its blocks are not cut; a 1B on one device runs alone."""
    best = find(estimator_of(EIGHT, "8xH100", row=8192, batch=128)).best
    assert best.candidate.state_split == 8
    assert (best.candidate.layout.tensor, best.candidate.layout.pipeline) == (1, 1)
    alone = find(estimator_of(ONE, "H100", row=4096, batch=64)).best
    assert alone.candidate.layout == Layout()
    assert alone.candidate.recompute == "none"


def test_experts_are_spread() -> None:
    facts = facts_from_config(
        {
            "model_type": "mixtral",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "vocab_size": 32000,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        }
    )
    found = find(estimator_of(facts, "8x8xH100", row=4096, batch=512))
    assert found.best.fits
    assert any("expert" in family for family in found.families)


def test_the_reason_is_a_number() -> None:
    estimator = estimator_of(EIGHT, "4x8xH100", row=8192, batch=256)
    found = find(estimator)
    text = explain.text(found, estimator=estimator)
    assert "shard + tensor: +" in text
    assert "exposed tensor communication (+" in text
    data = explain.report_json(found, cluster=estimator.cluster)
    assert data["plan"]["layout"]["shard"] == found.best.candidate.layout.shard > 1
    assert "reason" in data["rejected"]["shard + tensor"]


def test_what_cannot_fit_says_the_smallest_change() -> None:
    estimator = estimator_of(LARGE, "2x8xH100", row=8192, batch=64)
    with pytest.raises(UserError, match=r"do not fit on 2 x 8 H100-80.*the smallest needs") as told:
        find(estimator)
    assert "The smallest change that fits: 64 such devices" in str(told.value) or (
        "such devices (or a smaller model" in str(told.value)
    )
    with pytest.raises(UserError, match="replicas must divide the batch"):
        find(estimator_of(ONE, "8xH100", row=4096, batch=3), space=Space(fixed={"shard": 8}))


def test_choices_of_the_user_are_kept() -> None:
    space = Space(fixed={"tensor": 2, "micro_batch_samples": 1, "recompute": "full"})
    best = find(estimator_of(EIGHT, "8xH100", row=8192, batch=128), space=space).best.candidate
    assert (best.layout.tensor, best.micro_batch_samples, best.recompute) == (2, 1, "full")


def test_goals_deadline_and_budget() -> None:
    """More devices cost more per token and are faster; the cheapest and smallest meet the limit."""
    made = offers(estimator_of(ONE, "4x8xH100", row=4096, batch=256), tokens=2_000_000_000)
    assert [offer.cluster.workers for offer in made] == [1, 2, 4, 8, 16, 32]
    seconds = [offer.seconds for offer in made]
    assert seconds == sorted(seconds, reverse=True)
    fastest = choose(made, goal="speed")
    cheapest = choose(made, goal="cost", deadline=seconds[2])
    fewest = choose(made, goal="devices", deadline=seconds[2])
    assert fastest is made[-1]
    assert fewest is made[2]
    assert cheapest is not None and cheapest.price <= made[-1].price
    assert choose(made, goal="speed", budget=0.01) is None
    text = explain.offers_text(made, chosen=fastest, tokens=2_000_000_000)
    assert "devices pay" in text and "->" in text
    assert "None meets" in explain.offers_text(made, chosen=None, tokens=1)


def test_what_seldom_agreement_would_save() -> None:
    """Replicas over a slow network; a fixed policy is kept, and costs memory."""
    estimator = estimator_of(ONE, "4x1xRTX4090, 10Gbit", row=1024, batch=16)
    space = Space(fixed={"replicate": 4, "recompute": "full"})
    with pytest.raises(UserError, match="do not fit"):
        find(estimator, space=space)
    small = estimator_of(
        llama(1024, 4, 16, 16, 4096, tied=True), "4x1xRTX4090, 10Gbit", row=1024, batch=16
    )
    best = find(small, space=space).best
    fixed = {**space.fixed, "policy": "diloco", "every_steps": 100}
    seldom = find(small, space=Space(fixed=fixed)).best
    assert seldom.step_seconds < best.step_seconds
    assert seldom.first.optimizer > best.first.optimizer
    assert seldom.seconds["replicate"] < 0.1 * best.seconds["replicate"]


def test_the_parts_of_a_step_add_up() -> None:
    prediction = estimator_of(ONE, "2xA100", row=2048, batch=8).predict(
        Candidate(layout=Layout(replicate=2))
    )
    assert prediction.step_seconds == pytest.approx(sum(prediction.seconds.values()))
    assert prediction.tokens_per_second > 0
    assert prediction.first is prediction.last
