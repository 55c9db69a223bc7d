"""Goodput of a long run: failures and checkpoints, stragglers, and how policies bear them."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, expm1, log, sqrt

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """How often things fail and what that costs, in seconds.

    `device_failure_seconds` is the mean time between failures of one device (Llama 3 on 16,384
    H100: 419 interruptions in 54 days, one per 50,000 device hours; arXiv 2407.21783, section
    3.3.4); `save_seconds` is how long a save stops the run; `restart_seconds` runs from the
    failure to the first new step.
    """

    device_failure_seconds: float = 50_000 * 3600.0
    save_seconds: float = 30.0
    restart_seconds: float = 300.0


def failure_seconds(reliability: Reliability, *, workers: int) -> float:
    """Mean seconds between failures of a run: any of its devices stops it."""
    return reliability.device_failure_seconds / workers


def expected_goodput(reliability: Reliability, *, workers: int, interval_seconds: float) -> float:
    """Share of the time that ends up in kept steps when saving every `interval_seconds`.

    Exponential failures, which may also strike during saves and restarts (Daly 2006,
    doi:10.1016/j.future.2004.11.016, equation 20): tau / (M e^(R/M) (e^((tau+d)/M) - 1)).
    """
    mean = failure_seconds(reliability, workers=workers)
    cycle = (interval_seconds + reliability.save_seconds) / mean
    if cycle > 500:
        return 0.0
    waste = mean * exp(reliability.restart_seconds / mean) * expm1(cycle)
    return interval_seconds / waste


def best_interval_seconds(reliability: Reliability, *, workers: int) -> float:
    """The interval between saves with the highest expected goodput.

    Starts from Young's sqrt(2 d M) and refines by golden section, since Young's formula is off
    when a save takes a good part of the time between failures.
    """
    mean = failure_seconds(reliability, workers=workers)
    young = sqrt(2 * max(1e-6, reliability.save_seconds) * mean)
    low, high = log(young / 20), log(young * 5)
    ratio = (sqrt(5) - 1) / 2
    for _ in range(80):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        values = [
            expected_goodput(reliability, workers=workers, interval_seconds=exp(at))
            for at in (left, right)
        ]
        if values[0] > values[1]:
            high = right
        else:
            low = left
    return exp((low + high) / 2)


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """How steps of equal replicas differ.

    `spread` is the standard deviation of the logarithm of a step's time, `slow_share` of the
    replicas are `slow_factor` times as slow for the whole run.
    """

    spread: float = 0.02
    slow_share: float = 0.0
    slow_factor: float = 1.5


def waiting_factor(
    jitter: Jitter,
    *,
    replicas: int,
    policy: str = "every-step",
    every_steps: int = 1,
    seed: int = 0,
) -> float:
    """Time per step over that of an undisturbed replica, by drawing steps of every replica.

    every-step waits for the slowest of each step; local-sgd and both kinds of diloco for the
    slowest sum of `every_steps`.
    """
    generator = np.random.default_rng(seed)
    drawn = min(replicas, 4096)
    steps = max(200, 4 * every_steps)
    steps -= steps % max(1, every_steps)
    times = np.exp(generator.normal(-(jitter.spread**2) / 2, jitter.spread, (steps, drawn)))
    slow = round(jitter.slow_share * drawn)
    times[:, :slow] *= jitter.slow_factor
    period = every_steps if policy in {"local-sgd", "diloco", "streaming-diloco"} else 1
    sums = times.reshape(steps // period, period, drawn).sum(axis=1)
    return float(sums.max(axis=1).mean() / period)
