"""What a machine was measured at: the file that `shoal plan --calibrate` writes."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from shoal.environment import cache_directory, usable_cores
from shoal.errors import UserError

FORMAT = "shoal-measurements-3"
"""Written into every measurements file; a file of another format is refused."""

REFERENCE: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 2048,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 256,
        "n_head": 4,
        "n_positions": 256,
        "vocab_size": 2048,
    },
}
"""The models whose blocks are timed (config.json without the number of blocks)."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Times taken while `busy` workers of a kind compute at once, each with `threads` threads.

    Of one worker, all in seconds; threads have no products of their own. `products`: (precision,
    kind, tokens, columns, depth, s) of the three products of a linear layer: `forward` x w',
    `input` g w, `weight` g' x. `attention`: (precision, tokens of a row, head size, s per token
    and head), both passes. `blocks`: (precision, family, blocks, rows, tokens of a row, s): both
    passes of a REFERENCE model.
    `streams`: (bytes moved, s). `updates`: (parameters, s of zeroing, norm, scaling and AdamW).
    """

    workers: str
    busy: int
    threads: int
    products: tuple[tuple[str, str, int, int, int, float], ...] = ()
    attention: tuple[tuple[str, int, int, float], ...] = ()
    blocks: tuple[tuple[str, str, int, int, int, float], ...] = ()
    streams: tuple[tuple[float, float], ...] = ()
    updates: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One finished run: what was predicted (before any correction) and what it took.

    `state_bytes` are the part of the memory that is known exactly; 0 where memory is unknown.
    """

    run: str
    predicted_seconds: float
    measured_seconds: float
    predicted_bytes: float = 0.0
    measured_bytes: float = 0.0
    state_bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """One machine, in base units.

    `reduces`: (kind of worker, ranks, bytes, s) of the sum of a flat gradient over replicas.
    `start_seconds`: from the order to a worker's first word. `runs`: what later runs took.
    `is_short`: taken at a first use, with fewer shapes.
    """

    name: str
    cores: int
    memory_bytes: float
    conditions: tuple[Condition, ...]
    reduces: tuple[tuple[str, int, float, float], ...] = ()
    start_seconds: float = 0.0
    is_short: bool = False
    runs: tuple[Seen, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As stored."""
        return {"format": FORMAT, **asdict(self)}

    def peak(self, precision: str) -> float | None:
        """FLOPs per second of the fastest product seen, of all cores; None for another format."""
        rates = [
            each.busy * 2.0 * tokens * columns * depth / seconds
            for each in self.conditions
            for name, _, tokens, columns, depth, seconds in each.products
            if name == precision and each.busy * each.threads == self.cores
        ]
        return max(rates, default=None)


def machine_name() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine_key() -> str:
    """A short word for this processor, these cores and this torch: what measurements depend on."""
    parts = [machine_name(), str(usable_cores()), version("torch")]
    return xxhash.xxh3_64_hexdigest("\n".join(parts).encode())


def measurements_path() -> Path:
    """Where the measurements of this machine are kept; another machine has another file."""
    return cache_directory() / "machines" / f"{machine_key()}.json"


def save_measurements(measured: Measurements, path: Path) -> None:
    """Write them whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps(measured.to_json()) + "\n", encoding="utf-8")
    os.replace(beside, path)


def load_measurements(path: Path) -> Measurements:
    """Read a measurements file; raises UserError that says what is wrong with it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"measurements {path}: cannot be read ({error}); delete the file to measure anew, or "
            "give --cluster"
        ) from error
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise UserError(
            f"measurements {path}: expected format {FORMAT!r}, got "
            f"{data.get('format') if isinstance(data, Mapping) else type(data).__name__!r}; "
            "delete the file to measure anew, or give --cluster"
        )
    try:
        measured = Measurements(
            name=str(data["name"]),
            cores=int(data["cores"]),
            memory_bytes=float(data["memory_bytes"]),
            conditions=tuple(_condition(each) for each in data["conditions"]),
            reduces=_rows(data["reduces"], (str, int, float, float)),
            start_seconds=float(data["start_seconds"]),
            is_short=bool(data["is_short"]),
            runs=tuple(Seen(**each) for each in data["runs"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"measurements {path}: {error!r} while reading; expected "
            f"{', '.join(field.name for field in fields(Measurements))}; delete the file to "
            "measure anew, or give --cluster"
        ) from error
    if not any(each.products for each in measured.conditions):
        raise UserError(
            f"measurements {path}: no matrix product in them; delete the file to measure anew, or "
            "give --cluster"
        )
    return measured


def _condition(data: Mapping[str, Any]) -> Condition:
    return Condition(
        workers=str(data["workers"]),
        busy=int(data["busy"]),
        threads=int(data["threads"]),
        products=_rows(data["products"], (str, str, int, int, int, float)),
        attention=_rows(data["attention"], (str, int, int, float)),
        blocks=_rows(data["blocks"], (str, str, int, int, int, float)),
        streams=_rows(data["streams"], (float, float)),
        updates=_rows(data["updates"], (int, float)),
    )


def condition_from(data: Mapping[str, Any]) -> Condition:
    """A condition as a measuring worker reports it."""
    return _condition(data)


def _rows(data: Any, types: tuple[Callable[[Any], Any], ...]) -> Any:
    """Rows of typed cells; seconds (the last cell) must be more than zero."""
    rows = tuple(tuple(kind(cell) for kind, cell in zip(types, row, strict=True)) for row in data)
    if any(row[-1] <= 0 for row in rows):
        raise ValueError("seconds must be more than zero")
    return rows
