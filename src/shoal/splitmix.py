"""Well mixed bits of counters and keys: what shuffles, splits and draws by position are made of."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]


def mixed(words: Words | np.uint64) -> Words:
    """A step of SplitMix64 on each word (doi 10.1145/2660193.2660195): the same shape, a number's
    is [1]."""
    bits: Words = np.atleast_1d(words) + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def seed_of(*keys: int) -> int:
    """64 well mixed bits of several keys, by SplitMix64 over them, one after the other."""
    bits = np.zeros(1, dtype=np.uint64)
    for key in keys:
        bits = mixed(bits ^ np.uint64(key & (2**64 - 1)))
    return int(bits[0])


def uniform(*keys: int) -> float:
    """A number in [0, 1) of 53 random bits, the upper ones of `seed_of` the keys."""
    return (seed_of(*keys) >> 11) * 2.0**-53
