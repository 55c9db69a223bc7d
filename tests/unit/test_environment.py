"""What a process may use of its machine, which interface leads where, who started it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from shoal import environment
from shoal.environment import _core_limit, usable_cores
from shoal.errors import UserError


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "300000\n"}, None),
        ({"cpu.max": ""}, None),
        ({}, None),
    ],
)
def test_quotas_of_both_versions(tmp_path: Path, files: dict[str, str], cores: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _core_limit(tmp_path) == cores


def test_there_is_at_least_one_core_here() -> None:
    assert usable_cores() >= 1


def test_gloo_gets_the_interface_of_an_address_unless_the_user_named_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "_chosen", [])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "theirs")
    environment.talk_over("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "theirs"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    environment.talk_over("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setattr(environment, "_interface_of", {"10.0.0.7": "eth7"}.get)
    environment.talk_over("10.0.0.7")  # what we have named ourselves may change
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    environment.talk_over("10.0.0.8")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7", "nobody has it: as it was"


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_which_interface_has_an_address_and_which_leads_to_a_host() -> None:
    assert environment.address_towards("127.0.0.1") == "127.0.0.1"
    assert environment._interface_of("127.0.0.1") == "lo"
    assert environment._interface_of("192.0.2.77") is None  # of documentation (RFC 5737)
    with pytest.raises(OSError):
        environment.address_towards("no.such.host.invalid")


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"RANK": "0"}, "RANK is set, of RANK and WORLD_SIZE: expected both, or none"),
        ({"RANK": "a", "WORLD_SIZE": "2"}, "RANK: expected a number, as torchrun sets it, got 'a'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, WORLD_SIZE=2: expected RANK below WORLD_SIZE"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"},
            "LOCAL_RANK below LOCAL_WORLD_SIZE",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "4"},
            r"SLURM_STEP_NUM_TASKS=4 and RANK=0, WORLD_SIZE=1: 4 copies were started",
        ),
    ],
)
def test_variables_of_engines_that_contradict_each_other(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], text: str
) -> None:
    for name in (*environment._TORCHRUN, "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=text):
        environment.torchrun_rendezvous()


def test_several_copies_are_seen_by_what_schedulers_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert environment.started_together() is None
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert environment.started_together() is None
    monkeypatch.setenv("PMI_SIZE", "4")
    assert environment.started_together() == ("PMI_SIZE", 4)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert environment.started_together() is None, "torchrun's workers find each other"
