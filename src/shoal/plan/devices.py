"""The hardware table: peak rates, memory and links of devices, from devices.csv and a user's rows.

Rates are dense (no structured sparsity) and per second; links are per device and per direction.
`achievable` is the share of the peak that the best large matrix product reaches; the column
`source` says where a row is from. The ML Engineering book named there is
github.com/stas00/ml-engineering, compute/accelerator (maximum achievable matmul FLOPS); devices
absent in it take the share of their generation.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path

from shoal.environment import cache_directory
from shoal.errors import UserError, nearest
from shoal.plan.workload import WIDER

GB = 10**9
GIB = 2**30
TERA = 10**12


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of accelerator or CPU, as fast as its vendor says.

    `peak` and `achievable` are keyed by number format: fp32, fp16, bf16, fp8, fp4.
    `multiprocessors` run one matrix tile each; 0 where tiles do not matter (CPU).
    `memory_bytes` is what a program can have, as allocators report it: less than the name says.
    `node_devices` devices share the fast link; `price_per_hour` is in US dollars per device, a
    rounded public on-demand price of 2025 that a user's row may replace (0 = unknown).
    """

    name: str
    generation: str
    peak: Mapping[str, float]
    achievable: Mapping[str, float]
    memory_bytes: float
    memory_bytes_per_second: float
    multiprocessors: int
    node_devices: int
    node_link_bytes_per_second: float
    network_bytes_per_second: float
    price_per_hour: float = 0.0
    attention_share: float = 0.5
    aliases: tuple[str, ...] = ()
    source: str = ""

    def rate(self, precision: str) -> float:
        """Achievable FLOPs per second; a format the device lacks runs at the next wider one."""
        for name in WIDER[precision]:
            if name in self.peak:
                return self.peak[name] * self.achievable[name]
        raise UserError(
            f"device {self.name}: it has no rate for {precision} nor for a wider format; known: "
            f"{', '.join(self.peak)}. Add a row that has one with --devices FILE."
        )


_COLUMNS: dict[str, tuple[str, float, Callable[[float], float]]] = {
    "memory_gib": ("memory_bytes", GIB, float),
    "memory_gb_per_second": ("memory_bytes_per_second", GB, float),
    "multiprocessors": ("multiprocessors", 1, int),
    "node_devices": ("node_devices", 1, int),
    "node_link_gb_per_second": ("node_link_bytes_per_second", GB, float),
    "network_gbit": ("network_bytes_per_second", GB / 8, float),
    "price_per_hour": ("price_per_hour", 1, float),
    "attention_share": ("attention_share", 1, float),
}
"""Columns of numbers: the field, what a unit of the column is in it, and its type."""
_OPEN = ("price_per_hour", "attention_share", "multiprocessors")
"""Numbers that a row may leave out."""
_PEAKS = {f"{name}_tflops": name for name in WIDER}
_SHARES = {f"{name}_achievable": name for name in WIDER}
COLUMNS = ("name", "aliases", "generation", *_PEAKS, *_SHARES, *_COLUMNS, "source")
"""The columns of a table of devices."""


def read_devices(path: Path) -> tuple[Device, ...]:
    """The rows of a table; raises UserError that names file, line and column."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a table of devices ({error})") from error
    return _devices_in(text, where=str(path))


def _devices_in(text: str, *, where: str) -> tuple[Device, ...]:
    reader = csv.DictReader(text.splitlines())
    header = reader.fieldnames or ()
    for name in header:
        if name not in COLUMNS:
            raise UserError(
                f"{where}, line 1: unknown column {name!r}: {nearest(name, COLUMNS)}\n"
                f"    Known: {', '.join(COLUMNS)}"
            )
    for name in ("name", *_COLUMNS):
        if name not in header and name not in _OPEN:
            raise UserError(f"{where}, line 1: the column {name} is missing")
    found = []
    for row in reader:
        if None in row or None in row.values():
            raise UserError(
                f"{where}, line {reader.line_num}: the number of cells differs from the header's "
                f"{len(header)}; quote cells that hold a comma"
            )
        found.append(_device(row, where=f"{where}, line {reader.line_num}"))
    return tuple(found)


def _device(row: Mapping[str, str], *, where: str) -> Device:
    def number(column: str) -> float:
        try:
            value = float(row[column])
        except ValueError:
            value = -1.0
        most = 1.0 if column in _SHARES or column == "attention_share" else 1e9
        if not 0 <= value <= most or (value == 0 and column not in _OPEN):
            raise UserError(
                f"{where}, column {column}: expected a number above zero, at most {most:.0f}, got "
                f"{row[column]!r}"
            )
        return value

    def formats(columns: Mapping[str, str]) -> dict[str, float]:
        return {name: number(column) for column, name in columns.items() if row.get(column)}

    peak, achievable = formats(_PEAKS), formats(_SHARES)
    if not row["name"] or not peak or set(peak) != set(achievable):
        raise UserError(
            f"{where}: expected a name, and for at least one number format both a peak "
            f"(such as bf16_tflops) and the share of it that large products reach "
            f"(bf16_achievable); got peaks for {', '.join(peak) or 'none'} and shares for "
            f"{', '.join(achievable) or 'none'}"
        )
    numbers = {
        field: kind(number(column) * unit)
        for column, (field, unit, kind) in _COLUMNS.items()
        if row.get(column) or column not in _OPEN
    }
    return Device(
        name=row["name"],
        generation=row.get("generation") or "unknown",
        peak={name: value * TERA for name, value in peak.items()},
        achievable=achievable,
        aliases=tuple((row.get("aliases") or "").split()),
        source=row.get("source") or where,
        **{"multiprocessors": 0, **numbers},  # type: ignore[arg-type]
    )


@cache
def _shipped() -> tuple[Device, ...]:
    table = resources.files("shoal.plan").joinpath("devices.csv")
    return _devices_in(table.read_text(encoding="utf-8"), where="devices.csv")


def known_devices(more: Path | None = None) -> dict[str, Device]:
    """Every device by name; a later table replaces rows of an earlier one.

    The shipped table, then devices.csv in shoal's cache directory where there is one, then `more`.
    Raises UserError for a table that cannot be read.
    """
    own = cache_directory() / "devices.csv"
    tables = [_shipped(), read_devices(own) if own.is_file() else ()]
    tables += [read_devices(more)] if more is not None else []
    found: dict[str, Device] = {}
    for each in (row for table in tables for row in table):
        before = found.get(each.name, each)
        found[each.name] = replace(each, aliases=each.aliases or before.aliases)
    return found


def _squeeze(name: str) -> str:
    return re.sub(r"[^A-Z0-9]", "", name.upper().replace("SXM2", "").replace("SXM4", ""))


def device(name: str, *, known: Mapping[str, Device] | None = None) -> Device:
    """The device called `name` (`"H100"`, `"a100-40gb"`, ...) among `known`, or all there are.

    Raises UserError with the nearest names for one that is not in the table.
    """
    table = known_devices() if known is None else known
    wanted = re.sub(r"(SXM|GB$|NVIDIA|AMD)", "", _squeeze(name))
    names = {_squeeze(alias): each for each in table.values() for alias in each.aliases}
    names |= {_squeeze(each.name): each for each in table.values()}
    found = names.get(wanted) or names.get(_squeeze(name))
    if found is not None:
        return found
    aliases = [alias for each in table.values() for alias in each.aliases]
    raise UserError(
        f"unknown device {name!r}: {nearest(name.upper(), [*table, *aliases])}\n    Known: "
        f"{', '.join(table)}. Add a row of your own with --devices FILE (docs/guide/planner.md "
        "shows one)."
    )


def device_named(text: str) -> Device | None:
    """The device that a longer name means, such as a driver's "NVIDIA H100 80GB HBM3".

    The memory in it chooses among variants; None for one that is not in the table.
    """
    found = re.search(r"RTX\s*\w+|G?[ABH]\d00|V100|MI\d+X|L4\b", text.upper())
    if found is None:
        return None
    name = found[0].replace(" ", "")
    memory = re.search(r"\b(\d+)\s*GB\b", text.upper())
    for wanted in ([f"{name}-{memory[1]}"] if memory else []) + [name]:
        try:
            return device(wanted)
        except UserError:
            continue
    return None
