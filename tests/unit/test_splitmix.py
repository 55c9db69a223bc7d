"""The bits that shuffles, splits and masks are made of: another bit is another order of data."""

from __future__ import annotations

import numpy as np

from shoal.data.permutation import permute
from shoal.splitmix import mixed, seed_of, uniform


def test_the_bits_are_splitmix64s() -> None:
    """The first numbers of the reference code (Vigna, splitmix64.c) seeded with 1234567."""
    gamma, state, found = 0x9E3779B97F4A7C15, 1234567, []
    for _ in range(3):
        found.append(int(mixed(np.uint64(state))[0]))
        state = (state + gamma) % 2**64
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_words_keep_their_shape() -> None:
    words = np.arange(6, dtype=np.uint64).reshape(2, 3)
    assert (mixed(words).ravel() == mixed(words.ravel())).all() and mixed(words).shape == (2, 3)


def test_the_order_of_data_stays() -> None:
    """As it was when runs were saved that are to be resumed."""
    assert permute(np.arange(10), size=10, key=7).tolist() == [2, 5, 8, 9, 1, 4, 7, 3, 6, 0]


def test_draws_are_uniform_and_belong_to_their_keys() -> None:
    draws = np.array([uniform(7, n % 5, n) for n in range(20_000)])
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    # 19 degrees of freedom: 43.8 is exceeded once in a thousand times
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8
    assert uniform(7, 1, 2) == uniform(7, 1, 2)
    assert len({uniform(7, 1, 2), uniform(8, 1, 2), uniform(7, 2, 2), uniform(7, 2, 1)}) == 4


def test_seeds_belong_to_all_their_keys_in_order() -> None:
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 0), (0, 0)]
    assert len({seed_of(*each) for each in keys}) == len(keys)
    assert seed_of(3, 4) == seed_of(3, 4) < 2**64
