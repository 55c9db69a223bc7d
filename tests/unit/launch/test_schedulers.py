"""What is printed for schedulers: read by the tools that would run it, as far as they are here."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoal.cli import agent as agent_command
from shoal.cli import launch as launch_command
from shoal.environment import AGENT_PORT
from shoal.errors import UserError
from shoal.launch.clusters.kubernetes import manifests
from shoal.launch.clusters.mpi import command
from shoal.launch.clusters.ray import driver
from shoal.launch.clusters.slurm import script
from shoal.launch.clusters.start import Start

START = Start(
    "my recipe.yaml", ["train.steps=3"], Path("/runs/a"), 3, Path("/runs/keys"), AGENT_PORT
)


def is_bash(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_script_for_sbatch(tmp_path: Path) -> None:
    """Played with a srun, a scontrol and a shoal that say how they were called."""
    text = script(START)
    is_bash(text)
    assert "#SBATCH --nodes=3 --ntasks-per-node=1\n" in text and "--requeue" in text
    tools = {
        "scontrol": 'if [ $1 = show ]; then printf "h1\\nh2\\n"; else echo "$@" >> requeued; fi',
        "srun": 'echo "srun $*" >> called',
        "shoal": 'echo "shoal $*" >> called; while [ $# -gt 0 ]; do if [ "$1" = --hosts ]; then '
        'cp "$2" seen; fi; shift; done; while ! grep -q ^srun called; do sleep 0.01; done; exit 75',
    }
    for name, body in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = text.replace("/runs/", f"{tmp_path}/")
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "h"}
    done = subprocess.run(["bash", "-c", job], cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 75, done.stderr
    assert (tmp_path / "seen").read_text() == "h1:20012\nh2:20012\n"
    assert (tmp_path / "requeued").read_text() == "requeue 12\n"
    called = sorted((tmp_path / "called").read_text().splitlines())
    assert called[0].startswith("shoal launch hosts my recipe.yaml train.steps=3 --out")
    assert "--go-on" in called[0]
    assert "shoal agent --listen 0.0.0.0 --once" in called[1] and "--port 20012" in called[1]


def test_manifests_for_kubernetes() -> None:
    start = replace(START, keys=Path("/secret/keys"))
    text = manifests(start, name="shoal-run", image="registry/shoal:1", claim="runs")
    service, hosts, job = yaml.safe_load_all(text)
    assert [each["kind"] for each in (service, hosts, job)] == ["Service", "ConfigMap", "Job"]
    assert service["spec"]["clusterIP"] == "None"
    lines = hosts["data"]["hosts"].splitlines()
    assert lines[2] == f"shoal-run-2.shoal-run:{AGENT_PORT}" and len(lines) == 3
    pod: dict[str, Any] = job["spec"]["template"]["spec"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 3
    assert pod["subdomain"] == service["metadata"]["name"] == "shoal-run"
    (worker,) = pod["containers"]
    assert worker["image"] == "registry/shoal:1"
    is_bash(worker["command"][2])
    assert "'my recipe.yaml'" in worker["command"][2]
    mounts = {each["name"]: each["mountPath"] for each in worker["volumeMounts"]}
    assert mounts == {"hosts": "/shoal", "keys": "/secret", "runs": "/runs"}
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert volumes["keys"]["secret"] == {"secretName": "shoal-run-keys", "defaultMode": 0o400}
    assert volumes["runs"]["persistentVolumeClaim"] == {"claimName": "runs"}
    assert set(mounts) == set(volumes)
    assert json.dumps(job)


def test_names_that_kubernetes_does_not_take() -> None:
    with pytest.raises(UserError, match="--name: expected small letters"):
        manifests(replace(START, keys=Path("/k/k")), name="My_Run", image="i", claim="c")
    with pytest.raises(UserError, match="--keys: expected a folder of its own"):
        manifests(START, name="a", image="i", claim="c")


def test_a_command_for_mpirun() -> None:
    words = shlex.split(command(START, hosts=Path("/runs/hosts")))
    assert words[:3] == ["mpirun", "-n", "3"] and words[-2] == "-c"
    is_bash(words[-1])
    assert f"shoal agent --listen 0.0.0.0 --port {AGENT_PORT} --once" in words[-1]
    assert "--hosts /runs/hosts" in words[-1]


def test_a_driver_for_ray(tmp_path: Path) -> None:
    """Played with a ray that runs actors in this process; tests/hosts has the real one."""
    stand_in = tmp_path / "ray"
    for name in ("ray", "ray/util", "ray/util/placement_group", "ray/util/scheduling_strategies"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    (stand_in / "__init__.py").write_text(RAY)
    (stand_in / "util" / "placement_group" / "__init__.py").write_text(
        "class Group:\n    def ready(self): return []\n"
        "def placement_group(bundles, strategy):\n"
        "    assert bundles == [{'CPU': 2}] * 3 and strategy == 'STRICT_SPREAD'\n"
        "    return Group()\n"
    )
    (stand_in / "util" / "scheduling_strategies" / "__init__.py").write_text(
        "PlacementGroupSchedulingStrategy = lambda group, placement_group_bundle_index: None\n"
    )
    (stand_in / "util" / "__init__.py").write_text("get_node_ip_address = lambda: '10.0.0.1'\n")
    (tmp_path / "shoal").write_text(f'#!/bin/bash\necho "$*" >> {tmp_path}/called; exit 75\n')
    (tmp_path / "shoal").chmod(0o755)
    start = replace(START, keys=tmp_path / "keys")
    (tmp_path / "driver.py").write_text(driver(start, cpus=2))
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "driver.py"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    assert (tmp_path / "keys.hosts").read_text() == f"10.0.0.1:{AGENT_PORT}\n" * 3
    called = (tmp_path / "called").read_text().splitlines()
    assert sum("agent --listen 0.0.0.0" in line for line in called) == 4, "one was lost"
    assert sum("launch hosts my recipe.yaml" in line for line in called) == 1


RAY = """
class RayActorError(Exception): pass
class exceptions: RayActorError = RayActorError
class Method:
    def __init__(self, call): self.call = call
    def remote(self, *given):
        def result(): return self.call(*given)
        return result
class Actor:
    def __init__(self, kind): self.actor = kind()
    def __getattr__(self, name): return Method(getattr(self.actor, name))
def remote(**options):
    def made(kind):
        class Options:
            @staticmethod
            def options(**more): return Options
            @staticmethod
            def remote(): return Actor(kind)
        return Options
    return made
def init(): pass
lost = []
def get(what):
    if isinstance(what, list): return [get(each) for each in what]
    found = what()
    if found == 75 and not lost:
        lost.append(what)
        raise RayActorError
    return found
def wait(what, timeout): return ([*what[1:], what[0]][:1], [])
from ray import util
"""


def test_no_hosts_are_refused() -> None:
    with pytest.raises(UserError, match="--num-hosts: expected 1 or more, got 0"):
        Start("r", [], Path("o"), 0, Path("k"), AGENT_PORT)


def test_the_port_is_one() -> None:
    assert agent_command.agent.__defaults__ is not None
    assert AGENT_PORT in agent_command.agent.__defaults__
    for each in (launch_command.kubernetes, launch_command.mpi):
        assert AGENT_PORT in (each.__defaults__ or ())
