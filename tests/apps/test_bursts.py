"""The detector of bursts: against the theory of CUSUM, and on streams made by hand."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from apps.opinion.bursts import (
    DAY,
    HOUR,
    PER,
    Change,
    Detector,
    Rates,
    Settings,
    fingerprint,
    run_length,
    threshold_for,
)

SETTINGS = Settings()


def simulated(rate: float, *, factor: float, threshold: float, runs: int, seed: int) -> float:
    """Mean number of messages until the sum passes the threshold, by playing it."""
    draw = np.random.default_rng(seed)
    up = math.log(factor) - math.log1p((factor - 1) * rate)
    down = -math.log1p((factor - 1) * rate)
    sums, lengths, going = np.zeros(runs), np.zeros(runs), np.ones(runs, dtype=bool)
    while going.any():
        gains = np.where(draw.random(runs) < rate, up, down)
        sums = np.where(going, np.maximum(0, sums + gains), sums)
        lengths += going
        going &= sums <= threshold
    return float(lengths.mean())


def test_run_length_is_that_of_the_played_sum() -> None:
    """400 runs have a standard error of 5 % of an exponential's mean; the grid adds some."""
    theory = run_length(0.25, factor=2.5, threshold=3.0)
    played = simulated(0.25, factor=2.5, threshold=3.0, runs=400, seed=0)
    assert abs(played / theory - 1) < 0.2


def test_run_length_obeys_lordens_bound() -> None:
    """Lorden 1971: with threshold h there are e^h messages at least between false alarms."""
    for rate in (0.1, 0.25, 0.5):
        for threshold in (2.0, 5.0, 9.0):
            assert run_length(rate, factor=2.5, threshold=threshold) > math.exp(threshold)


def test_the_threshold_keeps_the_budget() -> None:
    found = threshold_for(SETTINGS)
    wanted = PER / SETTINGS.false_alarms
    assert run_length(0.25, factor=SETTINGS.factor, threshold=found) >= wanted
    assert threshold_for(replace(SETTINGS, false_alarms=2 * SETTINGS.false_alarms)) < found


def stream(
    detector: Detector, shares: list[tuple[int, float]], *, seed: int = 0, apart: float = 40.0
) -> list[Change]:
    """Changes of one topic over stretches of (messages, share of negative ones)."""
    draw, changes, at, number = random.Random(seed), [], 0.0, 0
    for count, share in shares:
        for _ in range(count):
            at, number = at + apart, number + 1
            text = "text " + "".join("abcdefghij"[int(each)] for each in str(number))
            found = detector.see("topic", text, negative=draw.random() < share, at=at)
            changes += [found] if found else []
    return changes


def test_one_alert_and_one_recovery() -> None:
    began, ended = stream(Detector(), [(3000, 0.25), (400, 0.6), (600, 0.25)])
    assert began.began and not ended.began
    assert 3000 * 40 < began.at < 3150 * 40 and began.since >= 2900 * 40
    assert began.negative > began.expected and began.messages >= began.negative
    assert ended.at > 3400 * 40 and ended.since == began.since


def test_a_burst_does_not_become_what_is_expected() -> None:
    detector = Detector()
    stream(detector, [(3000, 0.25), (400, 0.9), (600, 0.25)])
    hours = [detector.topic("topic").rates.expected(hour * HOUR) for hour in range(24)]
    assert max(hours) < 0.36


def test_many_messages_that_are_not_negative_are_no_burst() -> None:
    detector = Detector()
    assert stream(detector, [(2000, 0.25)]) == []
    assert stream(detector, [(3000, 0.2)], apart=0.1, seed=1) == []


def test_copies_count_once() -> None:
    detector = Detector()
    stream(detector, [(2000, 0.25)])
    at = 2001 * 40.0
    for number in range(500):
        text = f"@user{number} RT The same COMPLAINT, again!! https://t.co/{number}"
        assert detector.see("topic", text, negative=True, at=at + number) is None
    assert detector.is_copy("topic", "the same complaint again", at=at)
    assert not detector.is_copy("other", "the same complaint again", at=at)
    assert not detector.is_copy("topic", "the same complaint again", at=at + 2 * DAY)
    assert fingerprint("t", "A b") == fingerprint("t", "a  B.") != fingerprint("t", "a c")


def test_nothing_alarms_before_anything_is_known() -> None:
    assert stream(Detector(), [(150, 0.95), (2000, 0.95)]) == []


def test_a_daily_rhythm_is_learned() -> None:
    rates, draw = Rates(SETTINGS), random.Random(0)
    for number in range(20_000):
        at = number * 10 * DAY / 20_000
        rates.learn(at, draw.random() < 0.25 * (1 + 0.4 * math.sin(at / DAY * math.tau)))
    assert rates.expected(6 * HOUR) == pytest.approx(0.35, abs=0.05)
    assert rates.expected(18 * HOUR) == pytest.approx(0.15, abs=0.05)


def test_a_burst_ends_where_nobody_writes() -> None:
    detector = Detector()
    (began,) = stream(detector, [(3000, 0.25), (300, 0.9)])
    assert list(detector.silent(began.at + HOUR)) == []
    (ended,) = detector.silent(began.at + DAY)
    assert not ended.began and "nobody writes" in ended.why
    assert list(detector.silent(began.at + DAY)) == []


def test_what_lasts_becomes_the_level() -> None:
    began, ended = stream(Detector(), [(3000, 0.2), (6000, 0.6)])
    assert began.began and "the level now" in ended.why


@pytest.mark.slow
def test_marks_on_streams_with_a_classifiers_errors() -> None:
    """docs/evidence/apps.md has the figures. Of 16 streams two standard errors are 0.17, and of
    ten false alarms in a million messages two are six: bounds are that much looser."""
    from apps_opinion import World, measure

    score = measure(Detector, streams=16, world=World())
    assert sum(each <= 150 for each in score.delays) >= 0.7 * score.streams
    assert score.false * PER / score.quiet <= 1.6
    assert score.once >= 0.8 * score.streams
