"""Recordings: .wav files as numbers, with the words of each from a list beside them."""

from __future__ import annotations

import re
import wave
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal.data.columns import Record
from shoal.data.files import Report, ending_of, lines_of
from shoal.errors import DataError

Floats = NDArray[np.float32]

_PROMPT = re.compile(r"([^;:\s][^:]*):\s*([^\[<\s][^\[]*)(\[.*)?")
"""A line `digits/7: seven` of the list; what stands in brackets tells of tones or a sign."""
_TABLES = {".csv", ".tsv", ".json", ".jsonl", ".ndjson"}
_REPORT_EVERY = 50


def read_wave(path: Path) -> tuple[Floats, int]:
    """Samples [N] from -1 to 1 and how many there are in a second; of several channels the mean.

    Raises DataError for a file that is not there, damaged, empty, or no plain PCM of 8 to 32 bits.
    """
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            content = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(
            f"{path}: expected a .wav file of plain PCM, which cannot be read there ({error}); "
            "convert it, e.g. `ffmpeg -i FILE -ar 16000 -ac 1 -c:a pcm_s16le NEW.wav`"
        ) from error
    content = content[: len(content) // (channels * width) * channels * width]
    if not content or rate <= 0:
        raise DataError(f"{path}: expected sound, got a file without samples; remove it")
    if width == 1:  # the only width without a sign
        samples = np.frombuffer(content, "u1").astype(np.float32) / 128 - 1
    else:
        whole = np.zeros((len(content) // width, 4), dtype="u1")
        whole[:, 4 - width :] = np.frombuffer(content, "u1").reshape(-1, width)
        samples = (whole.view("<i4")[:, 0] / 2**31).astype(np.float32)
    return samples.reshape(-1, channels).mean(axis=1, dtype=np.float32), rate


def read_prompts(
    path: Path, *, text_field: str | None = None, at: Report = lambda done: None
) -> Iterator[Record]:
    """`{"audio": [N], "rate": 8000, "text": words}` of the telephone prompts of asterisk.

    `path`: the folder of one voice; the list of words is in the package's folder of documents.
    """
    listed = path.parents[2] / "doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    found = [_PROMPT.fullmatch(line.strip()) for _, line in lines_of(listed)]
    words = {match[1]: match[2].strip() for match in found if match is not None}
    for number, (name, text) in enumerate(sorted(words.items())):
        if number % _REPORT_EVERY == 0:
            at(number / len(words))
        file = path / f"{name}.wav"
        if file.is_file():
            audio, rate = read_wave(file)
            yield {"audio": audio, "rate": rate, "text": text}
    at(1.0)


def recordings_beside(tables: Iterable[Path]) -> list[Path]:
    """The .wav files in the folders of tables, and in those just below."""
    folders = sorted({table.parent for table in tables if ending_of(table) in _TABLES})
    found = (folder.glob(form) for folder in folders for form in ("*.wav", "*/*.wav"))
    return sorted(path for paths in found for path in paths)


def with_sound(records: Iterable[Record], *, table: Path) -> Iterator[Record]:
    """Records of a table; the name of a .wav file under `audio` becomes its sound and `rate`.

    Files are looked for in the table's folder and below; any other name stays as it is. Raises
    what `read_wave` raises.
    """
    home = table.parent.resolve()
    for record in records:
        name = str(record.get("audio"))
        is_name = name.isprintable() and name.lower().endswith(".wav")
        path = (home / name).resolve() if is_name else home
        if path.is_relative_to(home) and path.is_file():
            audio, rate = read_wave(path)
            record = {**record, "audio": audio, "rate": rate}
        yield record
