"""Choosing a token: keyed draws, limits and penalties, beside transformers' processors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from shoal.serve.request import Sampling
from shoal.serve.sampler import _adjusted, _kept, choose, top_of

LOGITS = np.random.default_rng(0).normal(0, 3, 500).astype(np.float32)


def settings(**given: Any) -> Sampling:
    return Sampling(max_tokens=1, **given)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], dtype=np.float32))
    drawn = [choose(logits, sampling=settings(seed=seed), position=3) for seed in range(8000)]
    counts = np.bincount(drawn, minlength=4)
    wanted = np.array([4000, 2000, 1200, 800])
    assert ((counts - wanted) ** 2 / wanted).sum() < 16.3  # 3 degrees of freedom, one in a thousand


@pytest.mark.parametrize(
    "given, theirs",
    [
        ({"top_k": 7}, TopKLogitsWarper(7)),
        ({"top_p": 0.8}, TopPLogitsWarper(0.8)),
        ({"top_p": 0.999}, TopPLogitsWarper(0.999)),
        ({"min_p": 0.05}, MinPLogitsWarper(0.05)),
    ],
)
def test_what_is_kept_is_what_transformers_keeps(given: dict[str, Any], theirs: Any) -> None:
    scores = theirs(None, torch.tensor(LOGITS)[None])[0]
    wanted = torch.isfinite(scores).nonzero().flatten().tolist()
    assert _kept(LOGITS.astype(np.float64), settings(**given)).tolist() == wanted


def test_repetition_is_penalised_as_transformers_does() -> None:
    seen = [3, 5, 5, 9]
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    wanted = processor(torch.tensor([seen]), torch.tensor(LOGITS)[None])[0]
    found = _adjusted(LOGITS, settings(repetition_penalty=1.7), seen[:2], seen[2:])
    assert np.allclose(found, wanted.numpy(), rtol=1e-6)


def test_presence_and_frequency_count_the_answer_alone() -> None:
    how = settings(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={4: 2.0})
    found = _adjusted(LOGITS, how, [1, 1, 1], [2, 2, 3]) - LOGITS
    wanted = {2: -1.0, 3: -0.75, 4: 2.0}
    assert {at: round(float(found[at]), 5) for at in np.flatnonzero(found)} == wanted


def test_equals_are_taken_by_the_lowest_id() -> None:
    flat = np.zeros(6, dtype=np.float32)
    assert choose(flat, sampling=settings(temperature=0.0), position=0) == 0
    assert _kept(flat.astype(np.float64), settings(top_k=2)).tolist() == [0, 1]
    assert [token for token, _ in top_of(flat, 3)] == [0, 1, 2]


def test_only_allowed_tokens_are_chosen() -> None:
    allowed = np.zeros(len(LOGITS), dtype=bool)
    allowed[[17, 400]] = True
    for seed in range(20):
        for temperature in (0.0, 1.5):
            how = settings(seed=seed, temperature=temperature)
            assert choose(LOGITS, sampling=how, position=seed, allowed=allowed) in (17, 400)
