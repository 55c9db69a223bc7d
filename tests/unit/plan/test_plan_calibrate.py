"""Measurements of a machine: read, fitted, learned from; and files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.errors import UserError
from shoal.plan import calibrate

MEASURED = calibrate.Measurements(
    name="two cores",
    memory_bytes=8e9,
    workers=2,
    products=(("fp32", 512, 512, 512, 2 * 512**3 / 5e10), ("bf16", 512, 512, 512, 2.6e-3)),
    streams=((1e6, 1e-4), (1e8, 1e-2)),
    reduces=((2, 1e4, 1.1e-3), (2, 1e6, 2e-3), (2, 1e7, 1.1e-2)),
    start_seconds=0.4,
)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "measurements.json"
    path.write_text(json.dumps(MEASURED.to_json()))
    assert calibrate.load_measurements(path) == MEASURED


def test_a_measured_machine_is_a_device() -> None:
    """The fastest product is the peak; the link is the slope of the all-reduce, 1 GB/s here.

    Points lie on 1 ms + bytes / 1 GB/s exactly, except for rounding of the first by 0.09 ms.
    """
    device = calibrate.device_of(MEASURED)
    assert device.peak["fp32"] == pytest.approx(5e10)
    assert device.rate("fp32") == device.peak["fp32"]
    assert device.memory_bytes_per_second == pytest.approx(1e10)
    assert device.node_link_bytes_per_second == pytest.approx(1e9, rel=0.1)
    assert device.node_devices == 2


def test_fit_line() -> None:
    start, rate = calibrate.fit_line([(0.0, 1e-3), (1e6, 2e-3), (1e7, 1.1e-2)])
    assert (start, rate) == (pytest.approx(1e-3), pytest.approx(1e9))
    assert calibrate.fit_line([(1e6, 1e-3), (2e6, 3e-3)])[0] == 0.0
    with pytest.raises(ValueError, match="at least two sizes"):
        calibrate.fit_line([(1.0, 1.0), (1.0, 2.0)])


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="this machine has not been measured: give --cluster"):
        calibrate.this_machine()
    calibrate.measurements_path().write_text(json.dumps(MEASURED.to_json()))
    cluster = calibrate.this_machine()
    assert cluster.workers == 2
    assert cluster.slowest.name == "two cores"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "expected format 'shoal-measurements-1', got 'list'"),
        ('{"format": "old"}', "got 'old'"),
        ('{"format": "shoal-measurements-1"}', "KeyError.*expected name, memory_bytes"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "measurements.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        calibrate.load_measurements(path)


def test_empty_measurements_are_refused() -> None:
    empty = calibrate.Measurements(
        name="nothing", memory_bytes=1.0, workers=1, products=(), streams=()
    )
    with pytest.raises(UserError, match="no matrix product or no memory stream"):
        calibrate.device_of(empty)


def test_learning_from_runs(tmp_path: Path) -> None:
    """Runs that all took 20 % longer: three of them move the model three quarters of the way."""
    run = tmp_path / "run"
    run.mkdir()
    content = {
        "predicted": {"step_seconds": 1.0, "peak_memory_bytes": 100},
        "outcome": {"step_seconds": 1.2, "peak_memory_bytes": 80},
    }
    (run / "plan.json").write_text(json.dumps(content))
    seen = calibrate.read_run(run)
    learned = calibrate.learn([seen] * 3)
    assert learned.time == pytest.approx(1.2**0.75)
    assert learned.memory == pytest.approx(0.8**0.75)
    assert learned.median_error_after < learned.median_error_before
    assert calibrate.learn([seen]).time == pytest.approx(1.2**0.5)
    with pytest.raises(ValueError, match="no runs"):
        calibrate.learn([])
    (run / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="no prediction and measurement to learn from"):
        calibrate.read_run(run)
