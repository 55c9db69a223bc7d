"""Shuffles of any size without a stored list: position i of an epoch -> sample, keyed.

A Feistel network over the next power of two, walked until it lands inside (Black and Rogaway,
"Ciphers with arbitrary finite domains", https://web.cs.ucdavis.edu/~rogaway/papers/subset.pdf).
It is a bijection for every size and key, costs the same at any position, and needs no memory.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xxhash

from shoal.splitmix import mixed

_ROUNDS = 4


def key_of(*parts: object) -> int:
    """A 64-bit key from any printable parts, the same on every machine and in every process."""
    return xxhash.xxh3_64_intdigest("\x1f".join(map(str, parts)).encode())


def _feistel(
    values: npt.NDArray[np.uint64], *, keys: npt.NDArray[np.uint64], bits: int
) -> npt.NDArray[np.uint64]:
    """One keyed bijection of [0, 2**bits). The halves need not be equal: each only xors."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for number in range(_ROUNDS):
        low = low ^ (mixed(high ^ mixed(keys + np.uint64(2 * number))) & low_mask)
        high = high ^ (mixed(low ^ mixed(keys + np.uint64(2 * number + 1))) & high_mask)
    return (high << low_bits) | low


def permute(
    positions: npt.ArrayLike, *, size: int, key: int | npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """Sample at each of `positions` [n] in the shuffle of `size` samples chosen by `key`.

    `key` is one key, or one per position [n]. Raises ValueError for a position outside the size.
    """
    values = np.atleast_1d(np.asarray(positions, dtype=np.int64))
    if values.size and (values.min() < 0 or values.max() >= size):
        raise ValueError(f"positions must lie in 0..{size - 1}")
    bits = max(2, (size - 1).bit_length())
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), values.shape)
    result = _feistel(values.astype(np.uint64), keys=keys, bits=bits)
    # Walking along the cycle until it is inside again keeps the map a bijection of [0, size);
    # the domain is at most twice the size, so that two walks are the average at worst.
    outside = np.flatnonzero(result >= np.uint64(size))
    while outside.size:
        result[outside] = _feistel(result[outside], keys=keys[outside], bits=bits)
        outside = outside[result[outside] >= np.uint64(size)]
    return result.astype(np.int64)
