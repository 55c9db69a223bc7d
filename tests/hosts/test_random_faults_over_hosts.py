"""A few random schedules of faults; `benchmarks/hosts_random.py` plays more of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hosts.lab import Lab, why_not
from hosts.random_faults import Schedule
from hosts.test_elected_over_hosts import Elected
from tiny import Bench

REASON = why_not() or (None if shutil.which("etcd") else "etcd is not installed (etcd-server)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(REASON), reason=str(REASON)),
]


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_the_losses_are_those_of_one_machine(
    bench: Bench, tmp_path: Path, seed: int
) -> None:
    with Lab(3, tmp_path / "lab") as lab:
        cluster = Elected(lab, tmp_path / "lab")
        Schedule(seed, bench=bench, cluster=cluster, folder=tmp_path).play()
