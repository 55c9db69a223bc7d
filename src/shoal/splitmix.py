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
