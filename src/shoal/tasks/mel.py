"""Log-mel spectrograms as Whisper reads them (Radford et al., 2022), and other rates of samples.

Equal to `WhisperFeatureExtractor` of transformers, but that silence behind a recording is not
computed: `SILENT` frames are put there when a batch is read.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

RATE = 16_000
"""Samples a second that Whisper hears."""
FRAMES = 100
"""Of a spectrogram, a second."""
SILENT = -10.0
"""In place of frames behind the recording: less than any value of a spectrogram."""

_WINDOW, _HOP = 400, RATE // FRAMES
_FLOOR, _RANGE = 1e-10, 8.0


@functools.cache
def _filters(mels: int) -> NDArray[Any]:
    """[mels, frequencies]."""
    from transformers.audio_utils import mel_filter_bank

    bank: NDArray[Any] = mel_filter_bank(
        num_frequency_bins=1 + _WINDOW // 2,
        num_mel_filters=mels,
        min_frequency=0.0,
        max_frequency=8000.0,
        sampling_rate=RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return bank.T


def spectrogram(samples: Floats, *, mels: int) -> Floats:
    """Frames [mels, F] of a recording [N] at 16 kHz, up to the last that hears any of it."""
    frames = -(-(len(samples) + _WINDOW // 2) // _HOP)
    behind = max(0, frames * _HOP + _WINDOW - len(samples))
    whole = np.pad(np.asarray(samples, dtype=np.float64), (0, behind))
    whole = np.pad(whole, (_WINDOW // 2, 0), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(whole, _WINDOW)[::_HOP][:frames]
    hann = np.hanning(_WINDOW + 1)[:-1]
    power = np.abs(np.fft.rfft(windows * hann)) ** 2
    logs = np.log10(np.maximum(_filters(mels) @ power.T, _FLOOR))
    return ((np.maximum(logs, logs.max() - _RANGE) + 4) / 4).astype(np.float32)


def resampled(samples: Floats, *, rate: int) -> Floats:
    """A recording at `rate` as one at 16 kHz: what both can hold of its spectrum, nothing else.

    By the Fourier transform of the whole, silence around it so that its ends do not meet.
    """
    if rate == RATE:
        return samples
    unit = rate // math.gcd(rate, RATE)  # so many samples are a whole number of those at 16 kHz
    around = -(-rate // 20 // unit) * unit
    behind = around + -len(samples) % unit
    whole = np.pad(np.asarray(samples, dtype=np.float64), (around, behind))
    count = len(whole) * RATE // rate
    found = np.fft.irfft(np.fft.rfft(whole)[: count // 2 + 1], count) * (count / len(whole))
    start = around * RATE // rate
    return found[start : start + round(len(samples) * RATE / rate)].astype(np.float32)
