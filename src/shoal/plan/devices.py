"""The hardware table: peak rates, memory and links of devices, with their sources.

Rates are dense (no structured sparsity) and per second; links are per device and per direction.
`achievable` is the share of the peak that the best large matrix product reaches. Unless a line
says otherwise, peaks, memory and links are those of the vendor's data sheet for the product, and
achievable shares come from the table of maximum achievable matmul FLOPS in the ML Engineering
book (github.com/stas00/ml-engineering, compute/accelerator): V100 is cuBLAS on large half
products (arXiv 1804.06826), devices absent there take the share of their generation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shoal.errors import UserError, nearest

if TYPE_CHECKING:
    from shoal.plan.rates import Rates

GB = 10**9
GIB = 2**30
TERA = 10**12


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of accelerator or CPU, as fast as its vendor or a measurement says.

    `peak` and `achievable` are keyed by number format: fp32, fp16, bf16, fp8, fp4.
    `multiprocessors` run one matrix tile each; 0 where tiles do not matter (CPU).
    `memory_bytes` is what a program can have, as allocators report it: less than the name says.
    `node_devices` devices share the fast link; `price_per_hour` is in US dollars per device, a
    rounded public on-demand price of 2025 that a cluster file may replace (0 = unknown).
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
    rates: Rates | None = None
    """What was measured, where this device is one worker of a measured machine."""

    def rate(self, precision: str) -> float:
        """Achievable FLOPs per second; a format the device lacks runs at the next wider one."""
        for name in WIDER[precision]:
            if name in self.peak:
                return self.peak[name] * self.achievable[name]
        raise UserError(
            f"device {self.name}: it has no rate for {precision} nor for a wider format; known: "
            f"{', '.join(self.peak)}. Give one in the cluster file under `peak`."
        )


WIDER = {
    "fp4": ("fp4", "fp8", "bf16", "fp16", "fp32"),
    "fp8": ("fp8", "bf16", "fp16", "fp32"),
    "bf16": ("bf16", "fp16", "fp32"),
    "fp16": ("fp16", "bf16", "fp32"),
    "fp32": ("fp32",),
}

_VOLTA = Device(
    name="V100-32",
    generation="volta",
    peak={"fp32": 15.7 * TERA, "fp16": 125 * TERA},
    achievable={"fp32": 0.90, "fp16": 0.75},
    memory_bytes=31.7 * GIB,
    memory_bytes_per_second=900 * GB,
    multiprocessors=80,
    node_devices=8,
    node_link_bytes_per_second=150 * GB,
    network_bytes_per_second=100 / 8 * GB / 8,
    price_per_hour=2.5,
    attention_share=0.35,
)
_AMPERE = Device(
    name="A100-80",
    generation="ampere",
    peak={"fp32": 19.5 * TERA, "fp16": 312 * TERA, "bf16": 312 * TERA},
    achievable={"fp32": 0.90, "fp16": 0.86, "bf16": 0.86},
    memory_bytes=79.1 * GIB,
    memory_bytes_per_second=2039 * GB,
    multiprocessors=108,
    node_devices=8,
    node_link_bytes_per_second=300 * GB,
    network_bytes_per_second=200 / 8 * GB,
    price_per_hour=2.5,
    attention_share=0.55,
)
_HOPPER = Device(
    name="H100-80",
    generation="hopper",
    peak={
        "fp32": 66.9 * TERA,
        "fp16": 989.4 * TERA,
        "bf16": 989.4 * TERA,
        "fp8": 1978.9 * TERA,
    },
    achievable={"fp32": 0.80, "fp16": 0.803, "bf16": 0.803, "fp8": 0.734},
    memory_bytes=79.1 * GIB,
    memory_bytes_per_second=3350 * GB,
    multiprocessors=132,
    node_devices=8,
    node_link_bytes_per_second=450 * GB,
    network_bytes_per_second=400 / 8 * GB,
    price_per_hour=4.0,
    attention_share=0.33,
)
_BLACKWELL = Device(
    name="B200",
    generation="blackwell",
    peak={
        "fp32": 75 * TERA,
        "fp16": 2250 * TERA,
        "bf16": 2250 * TERA,
        "fp8": 4500 * TERA,
        "fp4": 9000 * TERA,
    },
    achievable={"fp32": 0.80, "fp16": 0.776, "bf16": 0.776, "fp8": 0.763, "fp4": 0.736},
    memory_bytes=178.4 * GIB,
    memory_bytes_per_second=8000 * GB,
    multiprocessors=148,
    node_devices=8,
    node_link_bytes_per_second=900 * GB,
    network_bytes_per_second=400 / 8 * GB,
    price_per_hour=6.5,
    attention_share=0.35,
)
_RACK = {"fp32": 80 * TERA, "fp16": 2500 * TERA, "bf16": 2500 * TERA, "fp8": 5000 * TERA}
_PCIE4 = 25 * GB  # x16 generation 4: 31.5 GB/s on paper, about 25 in peer copies

DEVICES: tuple[Device, ...] = (
    replace(_VOLTA, name="V100-16", memory_bytes=15.8 * GIB),
    _VOLTA,
    replace(
        _AMPERE,
        name="A100-40",
        memory_bytes=39.4 * GIB,
        memory_bytes_per_second=1555 * GB,
        price_per_hour=2.0,
    ),
    _AMPERE,
    # A800 and H800 are the export variants: same chip, 400 GB/s of NVLink in both directions.
    replace(_AMPERE, name="A800-80", node_link_bytes_per_second=200 * GB),
    replace(_HOPPER, name="H800-80", node_link_bytes_per_second=200 * GB),
    _HOPPER,
    replace(
        _HOPPER,
        name="H100-94",
        memory_bytes=93.1 * GIB,
        memory_bytes_per_second=3900 * GB,
        node_link_bytes_per_second=300 * GB,
    ),
    replace(_HOPPER, name="GH200-96", memory_bytes=94.5 * GIB, memory_bytes_per_second=4000 * GB),
    replace(
        _HOPPER,
        name="H200",
        memory_bytes=139.8 * GIB,
        memory_bytes_per_second=4800 * GB,
        price_per_hour=4.5,
    ),
    _BLACKWELL,
    replace(
        _BLACKWELL,
        name="B300",
        memory_bytes=270 * GIB,
        peak={**_BLACKWELL.peak, "fp4": 13500 * TERA},
    ),
    replace(
        _BLACKWELL,
        name="GB200",
        peak={**_RACK, "fp4": 10000 * TERA},
        memory_bytes=184 * GIB,
        node_devices=72,
        price_per_hour=8.0,
    ),
    replace(
        _BLACKWELL,
        name="GB300",
        peak={**_RACK, "fp4": 15000 * TERA},
        memory_bytes=278 * GIB,
        node_devices=72,
        network_bytes_per_second=800 / 8 * GB,
        price_per_hour=10.0,
    ),
    replace(
        _AMPERE,
        name="RTX4090",
        generation="ada",
        peak={"fp32": 82.6 * TERA, "fp16": 165.2 * TERA, "bf16": 165.2 * TERA, "fp8": 330 * TERA},
        achievable={"fp32": 0.7, "fp16": 0.95, "bf16": 0.95, "fp8": 0.85},
        memory_bytes=23.6 * GIB,
        memory_bytes_per_second=1008 * GB,
        multiprocessors=128,
        network_bytes_per_second=10 / 8 * GB / 8,
        price_per_hour=0.5,
        node_link_bytes_per_second=_PCIE4,
    ),
    replace(
        _AMPERE,
        name="RTXA6000",
        peak={"fp32": 38.7 * TERA, "fp16": 154.8 * TERA, "bf16": 154.8 * TERA},
        memory_bytes=47.4 * GIB,
        memory_bytes_per_second=768 * GB,
        multiprocessors=84,
        network_bytes_per_second=10 / 8 * GB / 8,
        price_per_hour=0.8,
        node_link_bytes_per_second=_PCIE4,
    ),
    replace(
        _AMPERE,
        name="L4",
        generation="ada",
        peak={"fp32": 30.3 * TERA, "fp16": 121 * TERA, "bf16": 121 * TERA, "fp8": 242 * TERA},
        # A 72 W card: the sustained clock is about half of the boost clock of the data sheet.
        achievable={"fp32": 0.5, "fp16": 0.5, "bf16": 0.5, "fp8": 0.5},
        memory_bytes=22.0 * GIB,
        memory_bytes_per_second=300 * GB,
        multiprocessors=58,
        network_bytes_per_second=100 / 8 * GB / 8,
        price_per_hour=0.8,
        node_link_bytes_per_second=_PCIE4,
    ),
    Device(
        name="MI300X",
        generation="cdna3",
        peak={
            "fp32": 163.4 * TERA,
            "fp16": 1307 * TERA,
            "bf16": 1307 * TERA,
            "fp8": 2615 * TERA,
        },
        achievable={"fp32": 0.6, "fp16": 0.601, "bf16": 0.601, "fp8": 0.5},
        memory_bytes=191.9 * GIB,
        memory_bytes_per_second=5300 * GB,
        multiprocessors=304,
        node_devices=8,
        node_link_bytes_per_second=448 * GB,  # seven Infinity Fabric links of 64 GB/s
        network_bytes_per_second=400 / 8 * GB,
        price_per_hour=3.0,
        attention_share=0.3,
    ),
)

_ALIASES = {
    "V100": "V100-32",
    "A100": "A100-80",
    "A800": "A800-80",
    "H100": "H100-80",
    "H800": "H800-80",
    "GH200": "GH200-96",
    "4090": "RTX4090",
    "A6000": "RTXA6000",
}


def _squeeze(name: str) -> str:
    return re.sub(r"[^A-Z0-9]", "", name.upper().replace("SXM2", "").replace("SXM4", ""))


def device(name: str) -> Device:
    """The device called `name` (`"H100"`, `"a100-40gb"`, ...).

    Raises UserError with the nearest names for one that is not in the table.
    """
    wanted = re.sub(r"(SXM|GB$|NVIDIA|AMD)", "", _squeeze(name))
    wanted = _squeeze(_ALIASES.get(wanted, wanted))
    for known in DEVICES:
        if _squeeze(known.name) == wanted:
            return known
    names = [known.name for known in DEVICES]
    raise UserError(
        f"unknown device {name!r}: {nearest(name.upper(), [*names, *_ALIASES])}\n    Known: "
        f"{', '.join(names)}. Describe any other in a cluster file (docs/planner.md shows one)."
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
