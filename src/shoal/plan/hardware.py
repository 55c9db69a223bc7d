"""Clusters: nodes of devices and the links between them, read from a few words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shoal.errors import UserError
from shoal.plan.devices import GB, GIB, TERA, Device, device, known_devices

__all__ = [
    "GB",
    "GIB",
    "TERA",
    "Cluster",
    "Device",
    "Nodes",
    "device",
    "parse_cluster",
]


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """`count` equal nodes of `devices` devices each."""

    count: int
    devices: int
    device: Device

    @property
    def workers(self) -> int:
        """Number of devices in the group."""
        return self.count * self.devices


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Groups of nodes and the network between them (bytes per second, per device, one way).

    `fabric` is infiniband, roce, efa or ethernet; it sets the latency between nodes.
    """

    groups: tuple[Nodes, ...]
    network_bytes_per_second: float
    network_is_stated: bool = True
    fabric: str = "infiniband"
    source: str = field(default="", compare=False)

    @property
    def workers(self) -> int:
        """Number of devices."""
        return sum(group.workers for group in self.groups)

    @property
    def slowest(self) -> Device:
        """The device that a synchronous step waits for when the shares are even."""
        return min((group.device for group in self.groups), key=lambda d: d.rate("bf16"))

    @property
    def smallest_memory_bytes(self) -> float:
        """Memory of the smallest device."""
        return min(group.device.memory_bytes for group in self.groups)

    @property
    def node_devices(self) -> int:
        """Devices of the smallest node: axes that fit in it use the fast link."""
        return min(group.devices for group in self.groups)

    @property
    def price_per_hour(self) -> float:
        """US dollars per hour, 0 when a price is unknown."""
        priced = all(group.device.price_per_hour for group in self.groups)
        return sum(g.workers * g.device.price_per_hour for g in self.groups) if priced else 0.0

    def __str__(self) -> str:
        parts = [f"{g.count} x {g.devices} {g.device.name}" for g in self.groups]
        gbit = self.network_bytes_per_second * 8 / GB
        return " + ".join(parts) + f", {gbit:.4g} Gbit/s per device between nodes"


_LINK = re.compile(r"([0-9.]+)\s*(gbit|gbps|gb/s|tbit|mbit)(?:/(node|device))?", re.IGNORECASE)
_LINK_BYTES = {"gbit": GB / 8, "gbps": GB / 8, "gb/s": GB, "tbit": 1000 * GB / 8, "mbit": 1e6 / 8}


def parse_cluster(text: str, *, devices: Path | None = None) -> Cluster:
    """`"16x8xH100, 400Gbit"`, `"8xA100"` or `"2x8xH100 + 4x8xA100, 1600Gbit/node"`.

    A bare link rate is that of each device's own adapter; `/node` divides it over the node.
    `devices`: a table of further devices.
    Raises UserError for zero devices, an unknown device and text that cannot be read.
    """
    known = known_devices(devices)
    parts, _, rate = text.partition(",")
    groups = tuple(
        group
        for part in parts.split("+")
        for group in _parse_group(part.strip(), whole=text, known=known)
    )
    default = min(group.device.network_bytes_per_second for group in groups)
    if not rate.strip():
        return Cluster(
            groups=groups, network_bytes_per_second=default, network_is_stated=False, source=text
        )
    found = _LINK.fullmatch(rate.strip())
    if found is None:
        raise UserError(
            f"--cluster {text!r}: {rate.strip()!r} is no link rate; expected something like "
            "400Gbit, 1600Gbit/node or 25GB/s"
        )
    speed = float(found[1]) * _LINK_BYTES[found[2].lower()]
    if (found[3] or "").lower() == "node":
        speed /= min(group.devices for group in groups)
    if speed <= 0:
        raise UserError(f"--cluster {text!r}: the link rate must be more than zero")
    return Cluster(groups=groups, network_bytes_per_second=speed, source=text)


def _parse_group(text: str, *, whole: str, known: Mapping[str, Device]) -> list[Nodes]:
    found = re.fullmatch(r"(?:(\d+)\s*x\s*)?(?:(\d+)\s*x\s*)?([A-Za-z].*|4090)", text)
    if found is None:
        raise UserError(
            f"--cluster {whole!r}: {text!r} is not NODESxDEVICESxNAME, such as 16x8xH100 "
            "(or 8xH100 for one node)"
        )
    kind = device(found[3].strip(), known=known)
    first = int(found[1]) if found[1] else 1
    nodes, per_node = (first, int(found[2])) if found[2] else (1, first)
    if nodes * per_node < 1:
        raise UserError(f"--cluster {whole!r}: there are zero devices; give at least one")
    if found[2] or per_node <= kind.node_devices:
        return [Nodes(count=nodes, devices=per_node, device=kind)]
    full, left = divmod(per_node, kind.node_devices)
    groups = [Nodes(count=full, devices=kind.node_devices, device=kind)]
    return groups + ([Nodes(count=1, devices=left, device=kind)] if left else [])
