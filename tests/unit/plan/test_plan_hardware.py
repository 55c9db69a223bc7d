"""Clusters from words, devices of the table and of a user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.errors import UserError
from shoal.plan.devices import COLUMNS, known_devices, read_devices
from shoal.plan.hardware import GB, device, parse_cluster


def test_the_table_is_complete() -> None:
    """Every device has a rate for each format it lists, memory, and a fast link."""
    for known in known_devices().values():
        assert set(known.peak) == set(known.achievable)
        assert known.memory_bytes > 15e9
        for precision in ("fp32", "bf16", "fp8", "fp4"):
            assert 0 < known.rate(precision) <= max(known.peak.values())
    wanted = "V100-16 V100-32 A100-40 A100-80 H100-80 H100-94 H200 B200 GB200 RTX4090 L4 MI300X"
    assert set(wanted.split()) <= set(known_devices())
    assert all(known.source for known in known_devices().values())


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


def test_a_format_without_any_wider_one_is_refused() -> None:
    from dataclasses import replace

    odd = replace(device("A100"), peak={"fp8": 1e12}, achievable={"fp8": 1.0})
    with pytest.raises(UserError, match="no rate for bf16 nor for a wider format"):
        odd.rate("bf16")


OWN = (
    "name,aliases,bf16_tflops,bf16_achievable,memory_gib,memory_gb_per_second,node_devices,"
    "node_link_gb_per_second,network_gbit"
)
ROW = "Ours-48,ours,200,0.8,47,1000,4,50,100"


def test_rows_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From --devices, and from the cache directory; a later row replaces an earlier one."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    path = tmp_path / "own.csv"
    path.write_text(f"{OWN}\n{ROW}\nH100-80,,500,1,40,1000,8,50,100\n")
    cluster = parse_cluster("2x4xours", devices=path)
    assert cluster.slowest.name == "Ours-48" and cluster.network_bytes_per_second == 12.5 * GB
    assert cluster.slowest.rate("bf16") == pytest.approx(160e12)
    assert parse_cluster("H100", devices=path).smallest_memory_bytes == 40 * 2**30
    with pytest.raises(UserError, match=r"(?s)unknown device 'ours'.*--devices FILE"):
        parse_cluster("ours")
    path.rename(tmp_path / "devices.csv")
    assert parse_cluster("ours").workers == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{OWN},colour\n{ROW},red", r"own\.csv, line 1: unknown column 'colour'"),
        (f"{OWN},bf16_tflop\n{ROW},1", r"line 1: unknown column 'bf16_tflop': did you mean"),
        ("name,memory_gib\na,1", r"line 1: the column memory_gb_per_second is missing"),
        (f"{OWN}\n{ROW}\nb,,x,0.8,47,1000,4,50,100", r"line 3, column bf16_tflops: .* got 'x'"),
        (f"{OWN}\nb,,1,0.8,0,1000,4,50,100", r"line 2, column memory_gib: .* got '0'"),
        (f"{OWN}\nb,,1,0.8,nan,1000,4,50,100", r"line 2, column memory_gib: .* got 'nan'"),
        (f"{OWN}\nb,,1,1.2,47,1000,4,50,100", r"column bf16_achievable: .* at most 1, got '1.2'"),
        (f"{OWN}\n{ROW},7", r"line 2: the number of cells differs from the header's 9"),
        (f"{OWN}\nb,,1,,47,1000,4,50,100", r"line 2: expected a name.*got peaks for bf16 and sh"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.csv"
    path.write_text(text + "\n")
    with pytest.raises(UserError, match=message):
        read_devices(path)


def test_a_table_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as a table of devices"):
        read_devices(tmp_path / "absent.csv")
    assert {"bf16_tflops", "memory_gib", "source"} <= set(COLUMNS)
