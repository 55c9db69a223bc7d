"""Clusters from words and files, and devices that are not known."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.errors import UserError
from shoal.plan.hardware import DEVICES, GB, device, parse_cluster


def test_the_table_is_complete() -> None:
    """Every device has a rate for each format it lists, memory, and a fast link."""
    for known in DEVICES:
        assert set(known.peak) == set(known.achievable)
        assert known.memory_bytes > 15e9
        for precision in ("fp32", "bf16", "fp8", "fp4"):
            assert 0 < known.rate(precision) <= max(known.peak.values())
    wanted = "V100-16 V100-32 A100-40 A100-80 H100-80 H100-94 H200 B200 GB200 RTX4090 L4 MI300X"
    assert set(wanted.split()) <= {known.name for known in DEVICES}


@pytest.mark.parametrize(
    ("text", "workers", "network"),
    [
        ("16x8xH100, 400Gbit", 128, 50 * GB),
        ("8xA100-40GB", 8, 25 * GB),
        ("a100", 1, 25 * GB),
        ("4x8xH100-SXM, 1600Gbit/node", 32, 25 * GB),
        ("2x2x4090, 10 Gbit/node", 4, 0.625 * GB),
        ("2x8xH100 + 4x8xA100, 25GB/s", 48, 25 * GB),
        ("100xH100", 100, 50 * GB),
    ],
)
def test_clusters_in_words(text: str, workers: int, network: float) -> None:
    cluster = parse_cluster(text)
    assert cluster.workers == workers
    assert cluster.network_bytes_per_second == pytest.approx(network)
    assert cluster.network_is_stated == ("," in text)


def test_mixed_clusters_wait_for_their_slowest() -> None:
    cluster = parse_cluster("1x8xH100 + 1x8xA100-40")
    assert cluster.slowest.name == "A100-40"
    assert cluster.smallest_memory_bytes == device("A100-40").memory_bytes
    assert cluster.price_per_hour == pytest.approx(8 * 4.0 + 8 * 2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8xH101", r"unknown device 'H101': did you mean 'H100'"),
        ("0x8xH100", r"zero devices; give at least one"),
        ("8x", r"'8x' is not NODESxDEVICESxNAME"),
        ("8xH100, fast", r"'fast' is no link rate; expected something like 400Gbit"),
        ("8xH100, 0Gbit", r"link rate must be more than zero"),
    ],
)
def test_clusters_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_cluster(text)


def test_cluster_files(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "network_gbit: 100\nnodes:\n- {count: 2, devices: 4, device: {like: A100, name: Ours, "
        "price_per_hour: 1.0}}\n- {devices: 8, device: L4}\n"
    )
    cluster = parse_cluster(str(path))
    assert (cluster.workers, cluster.network_bytes_per_second) == (16, 12.5 * GB)
    assert cluster.groups[0].device.price_per_hour == 1.0
    path.write_text("nodes: 3")
    with pytest.raises(UserError, match="expected a mapping with a list `nodes`"):
        parse_cluster(str(path))
    path.write_text("nodes: []")
    with pytest.raises(UserError, match="zero devices"):
        parse_cluster(str(path))
    path.write_text("nodes: [{devices: two, device: L4}]")
    with pytest.raises(UserError, match=r"cannot be read.*expected count, devices and device"):
        parse_cluster(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        parse_cluster(str(tmp_path / "absent.yaml"))


def test_a_format_without_any_wider_one_is_refused() -> None:
    from dataclasses import replace

    odd = replace(device("A100"), peak={"fp8": 1e12}, achievable={"fp8": 1.0})
    with pytest.raises(UserError, match="no rate for bf16 nor for a wider format"):
        odd.rate("bf16")
