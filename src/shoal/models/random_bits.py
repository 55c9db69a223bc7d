"""Random numbers by position: a counter, a key, and arithmetic that every processor rounds alike.

Random bits: SplitMix64 as a counter (Steele, Lea, Flood 2014, doi 10.1145/2660193.2660195).
Normal numbers: the inverse of the distribution function, algorithm AS 241 PPND7 (Wichura 1988,
doi 10.2307/2347330; relative error about 1e-7, that of float32). Only + - * / and sqrt in float64
are used, which IEEE 754 rounds exactly: the bits do not depend on the processor, on numpy's vector
width, or on where in an array an element stands.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_LN2 = 0.6931471805599453

_CENTRE_TOP = (5.9109374720e01, 1.5929113202e02, 5.0434271938e01, 3.3871327179e00)
_CENTRE_BOTTOM = (6.7187563600e01, 7.8757757664e01, 1.7895169469e01, 1.0)
_TAIL_TOP = (1.7023821103e-01, 1.3067284816e00, 2.7568153900e00, 1.4234372777e00)
_TAIL_BOTTOM = (1.2021132975e-01, 7.3700164250e-01, 1.0)
_FAR_TOP = (1.7337203997e-02, 4.2868294337e-01, 3.0812263860e00, 6.6579051150e00)
_FAR_BOTTOM = (1.2258202635e-02, 2.4197894225e-01, 1.0)

Floats = NDArray[np.float64]


def mix64(value: int) -> int:
    """SplitMix64's finaliser on one 64-bit integer."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def key_of(*parts: int | str) -> int:
    """A 64-bit key from integers and names, stable over processes and versions."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniform(positions: NDArray[np.uint64], *, key: int) -> Floats:
    """Uniform numbers in (0, 1), never its ends, one per position (destroyed); float64."""
    bits = positions
    bits *= np.uint64(_GAMMA)
    bits += np.uint64((key + _GAMMA) & _MASK)
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    bits >>= np.uint64(12)
    numbers = bits.view(np.int64).astype(np.float64)
    numbers += 0.5
    numbers *= 2.0**-52
    return numbers


def normal_quantile(probability: Floats) -> Floats:
    """The standard normal number below which a draw lies with this probability (0 < p < 1)."""
    offset = probability - 0.5
    square = offset * offset
    near = 0.180625 - square
    result = _ratio(near, _CENTRE_TOP, _CENTRE_BOTTOM)
    result *= offset
    outside = np.flatnonzero(square > 0.180625)
    if outside.size:
        chosen = probability[outside]
        root = np.sqrt(-_log(np.minimum(chosen, 1.0 - chosen)))
        tail = np.where(
            root <= 5.0,
            _ratio(root - 1.6, _TAIL_TOP, _TAIL_BOTTOM),
            _ratio(root - 5.0, _FAR_TOP, _FAR_BOTTOM),
        )
        result[outside] = np.copysign(tail, chosen - 0.5)
    return result


def _ratio(at: Floats, top: tuple[float, ...], bottom: tuple[float, ...]) -> Floats:
    upper = _polynomial(at, top)
    upper /= _polynomial(at, bottom)
    return upper


def _polynomial(at: Floats, coefficients: tuple[float, ...]) -> Floats:
    """Highest power first (Horner)."""
    result = at * coefficients[0]
    for coefficient in coefficients[1:-1]:
        result += coefficient
        result *= at
    result += coefficients[-1]
    return result


def _log(value: Floats) -> Floats:
    """Natural logarithm by exactly rounded operations only: 2 artanh((m-1)/(m+1)) + e ln 2."""
    mantissa, exponent = np.frexp(value)
    low = mantissa < 0.7071067811865476
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    exponent = np.where(low, exponent - 1, exponent)
    ratio = (mantissa - 1.0) / (mantissa + 1.0)
    square = ratio * ratio
    # |ratio| <= 0.172: the term left out is below 2e-16
    series = _polynomial(square, tuple(1.0 / power for power in range(19, 0, -2)))
    return 2.0 * ratio * series + exponent * _LN2
