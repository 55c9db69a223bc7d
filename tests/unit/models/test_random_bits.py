from statistics import NormalDist

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shoal.models.random_bits import key_of, mix64, normal_quantile, uniform


def _uniform(start: int, count: int, *, key: int) -> np.ndarray:
    return uniform(np.arange(start, start + count, dtype=np.uint64), key=key)


@given(st.floats(1e-12, 1 - 1e-12))
def test_the_quantile_inverts_the_normal_distribution(p: float) -> None:
    # AS 241 PPND7 promises about 7 digits; near the median the value itself is near 0
    expected = NormalDist().inv_cdf(p)
    assert abs(normal_quantile(np.array([p]))[0] - expected) <= 3e-7 * max(1.0, abs(expected))


@given(st.integers(0, 2**62), st.integers(0, 2**64 - 1), st.integers(1, 50), st.integers(0, 49))
def test_a_number_depends_on_its_position_only(start: int, key: int, count: int, at: int) -> None:
    whole = _uniform(start, 50, key=key)
    stop = min(50, at + count)
    assert np.array_equal(whole[at:stop], _uniform(start + at, stop - at, key=key))


def test_the_counter_is_splitmix64() -> None:
    # first outputs of the published generator for seed 1234567
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    words = [mix64(1234567 + (i + 1) * 0x9E3779B97F4A7C15) for i in range(3)]
    assert words == expected
    numbers = _uniform(0, 3, key=1234567)
    assert np.array_equal(numbers, (np.array([w >> 12 for w in words]) + 0.5) * 2.0**-52)


def test_uniform_numbers_fill_the_open_interval() -> None:
    numbers = _uniform(0, 200_000, key=key_of(0, "a"))
    assert numbers.min() > 0 and numbers.max() < 1
    # the mean of n uniforms has standard error 1 / sqrt(12 n) = 6.5e-4: five of them
    assert abs(numbers.mean() - 0.5) < 5 * 6.5e-4
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    # chi squared with 99 degrees of freedom: mean 99, deviation 14; six deviations above
    assert ((counts - 2000) ** 2 / 2000).sum() < 99 + 6 * 14


def test_keys_of_different_names_give_unrelated_numbers() -> None:
    first, second = (_uniform(0, 100_000, key=key_of(0, n)) for n in ("a.weight", "b.weight"))
    # the correlation of independent sequences has standard error 1 / sqrt(n) = 3.2e-3
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 * 3.2e-3
    assert key_of(0, "a") != key_of(1, "a") != key_of(1, "b")
