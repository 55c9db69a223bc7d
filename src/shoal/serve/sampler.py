"""From logits to a token: penalties, limits, and a draw keyed by (seed, answer, position).

No generator is shared and nothing is drawn for a batch, so a token does not depend on neighbours,
on restarts or on how many were drawn before it. Everything is in float64 over one row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shoal.serve.request import Sampling
from shoal.splitmix import uniform

Row = NDArray[np.float32]
Wide = NDArray[np.float64]


def choose(
    logits: Row,
    *,
    sampling: Sampling,
    position: int,
    prompt: Sequence[int] = (),
    made: Sequence[int] = (),
    allowed: NDArray[np.bool_] | None = None,
) -> int:
    """The token at `position` of its sequence, from logits [V].

    In this order: penalties of the repetition (CTRL, arXiv 1909.05858; over prompt and answer), of
    presence and frequency (over the answer, as OpenAI's), bias, `allowed` tokens, temperature,
    top_k, top_p (arXiv 1904.09751), min_p (arXiv 2407.01082).
    """
    if allowed is None and sampling.temperature == 0.0 and _is_plain(sampling):
        return int(np.argmax(logits))  # the first of equals, as below
    scores = _adjusted(logits, sampling, prompt, made)
    if allowed is not None:
        scores[~allowed] = -np.inf
    if sampling.temperature == 0.0:
        return int(np.argmax(scores))
    kept = _kept(scores / sampling.temperature, sampling)
    weights = np.exp((scores[kept] - scores[kept].max()) / sampling.temperature)
    sums = np.cumsum(weights)
    at = np.searchsorted(sums, uniform(sampling.seed, sampling.index, position) * sums[-1], "right")
    return int(kept[min(int(at), len(kept) - 1)])


def _is_plain(sampling: Sampling) -> bool:
    """Whether the logits are taken as they are."""
    return (
        sampling.repetition_penalty == 1.0
        and not sampling.presence_penalty
        and not sampling.frequency_penalty
        and not sampling.logit_bias
    )


def _adjusted(logits: Row, sampling: Sampling, prompt: Sequence[int], made: Sequence[int]) -> Wide:
    scores: Wide = logits.astype(np.float64)
    if sampling.repetition_penalty != 1.0:
        seen = np.unique(np.array([*prompt, *made], dtype=np.int64))
        values = scores[seen]
        penalty = sampling.repetition_penalty
        scores[seen] = np.where(values > 0, values / penalty, values * penalty)
    if (sampling.presence_penalty or sampling.frequency_penalty) and made:
        counts = Counter(made)
        ids = np.fromiter(counts, dtype=np.int64)
        times = np.fromiter(counts.values(), dtype=np.float64)
        scores[ids] -= sampling.presence_penalty + sampling.frequency_penalty * times
    for token, bias in sampling.logit_bias.items():
        scores[token] += bias
    return scores


def _kept(scores: Wide, sampling: Sampling) -> NDArray[np.int64]:
    """Ids that may be drawn, ascending. Of equally likely ones the lower id is kept first."""
    ids = np.flatnonzero(np.isfinite(scores))
    if 0 < sampling.top_k < len(ids):
        ids = _likeliest(scores, ids, sampling.top_k)
    if sampling.top_p < 1.0:
        ids = _nucleus(scores, ids, sampling.top_p)
    if sampling.min_p > 0.0:
        ids = ids[scores[ids] >= scores[ids].max() + np.log(sampling.min_p)]
    return np.sort(ids)


def _likeliest(scores: Wide, ids: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The `count` likeliest of `ids` (ascending), likeliest first, of equals the lowest id."""
    values = scores[ids]
    least = np.partition(values, len(values) - count)[len(values) - count]
    near = ids[values >= least]
    return near[np.argsort(-scores[near], kind="stable")][:count]


def _nucleus(scores: Wide, ids: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    """The fewest likeliest ids whose probabilities reach `share`."""
    ids = np.sort(ids)
    weights = np.exp(scores[ids] - scores[ids].max())
    total = weights.sum()
    count = min(256, len(ids))
    while True:
        first = _likeliest(scores, ids, count)
        sums = np.cumsum(np.exp(scores[first] - scores[first[0]]))
        enough = int(np.searchsorted(sums, share * total)) + 1
        if enough <= count or count == len(ids):
            return first[:enough]
        count = min(8 * count, len(ids))


def top_of(logprobs: Row, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens of a row with their values, likeliest first."""
    if count <= 0:
        return ()
    ids = _likeliest(
        logprobs.astype(np.float64), np.arange(len(logprobs)), min(count, len(logprobs))
    )
    return tuple((int(each), float(logprobs[each])) for each in ids)
