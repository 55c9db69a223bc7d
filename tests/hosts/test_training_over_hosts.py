"""Runs over two hosts, started by engines that people have: the digits are those of one machine."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hosts.lab import Lab, why_not
from shoal.environment import AGENT_PORT
from shoal.launch.clusters.mpi import command
from shoal.launch.clusters.start import Start
from tiny import Bench, Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(why_not()), reason=str(why_not())),
]
WORDS = ("parallel.replicate=2", "train.steps=8", "train.evaluate_every_steps=4")
BIN = Path(sys.executable).parent


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab(2, tmp_path) as made:
        yield made


def test_torchrun(bench: Bench, lab: Lab, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shoal = [BIN / "shoal", "train", bench.recipe, "--out", out, *WORDS]
    meet = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=lab"]
    meet += ["--rdzv-endpoint=h1:29500", "--no-python"]
    started = [
        host.start(
            *(BIN / "torchrun", *meet, *shoal),
            env={"GLOO_SOCKET_IFNAME": "eth0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for host in lab.hosts
    ]
    said = [each.communicate(timeout=300)[0] for each in started]
    assert [each.returncode for each in started] == [0, 0], said
    one_machine = bench.run(*WORDS)
    assert Run(out).digits == one_machine.digits
    assert Run(out).weights == one_machine.weights


def test_what_mpirun_starts(bench: Bench, lab: Lab, tmp_path: Path) -> None:
    """The command for it, played: once on each host, with the number that it gives."""
    hosts, out = tmp_path / "hosts", tmp_path / "run"
    hosts.write_text("".join(f"{host.name}\n" for host in lab.hosts))
    start = Start(str(bench.recipe), WORDS, out, 2, tmp_path / "keys", AGENT_PORT)
    *_, words = shlex.split(command(start, hosts=hosts))
    started = [
        host.start(
            *("bash", "-c", words),
            env={"OMPI_COMM_WORLD_RANK": str(rank), "PATH": f"{BIN}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank, host in enumerate(lab.hosts)
    ]
    said = [each.communicate(timeout=300)[0] for each in started]
    assert [each.returncode for each in started] == [0, 0], said
    assert Run(out).digits == bench.run(*WORDS).digits
