"""What `shoal launch` prints, run by the engines that it is for: digits as on one machine.

Slurm, Open MPI and Ray are real, each over two hosts of the lab; Kubernetes is played (pods.py).
Each is skipped, with the reason, where it is not installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hosts.lab import Host, Lab, why_not
from hosts.pods import Job
from shoal.environment import AGENT_PORT
from shoal.launch.clusters import kubernetes, mpi, ray, slurm
from shoal.launch.clusters.start import Start
from tiny import Bench, Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(why_not()), reason=str(why_not())),
]
WORDS = ("parallel.replicate=2", "train.steps=8", "train.evaluate_every_steps=4")
BIN = Path(sys.executable).parent
ENV = {"PATH": f"{BIN}:{os.environ['PATH']}"}


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab(2, tmp_path) as made:
        yield made


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [each for each in programs if shutil.which(each) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def start(bench: Bench, folder: Path, *words: str) -> Start:
    given = words or WORDS
    return Start(str(bench.recipe), given, folder / "run", 2, folder / "keys", AGENT_PORT)


def check(bench: Bench, out: Path) -> None:
    one_machine = bench.run(*WORDS)
    assert Run(out).digits == one_machine.digits
    assert Run(out).weights == one_machine.weights


REMOTE_SHELL = """\
#!/bin/bash
while [[ $1 == -* ]]; do shift; done
host=$1; shift
exec nsenter -t "$(cat {folder}/$host.pid)" --mount --uts --net --pid --wdns="$PWD" -- bash -c "$*"
"""


@needs("mpirun")
def test_mpirun(bench: Bench, lab: Lab, tmp_path: Path) -> None:
    """From the first host's network; the others are reached by what stands for ssh."""
    hosts, shell = tmp_path / "hosts", tmp_path / "remote_shell"
    hosts.write_text("".join(f"{host.name}\n" for host in lab.hosts))
    shell.write_text(REMOTE_SHELL.format(folder=tmp_path))
    shell.chmod(0o755)
    for host in lab.hosts:
        (tmp_path / f"{host.name}.pid").write_text(str(host.pid))
    names = ("oob_tcp_if_include", "btl_tcp_if_include")
    env = {**os.environ, **ENV, **{f"OMPI_MCA_{name}": "eth0" for name in names}}
    env |= {"OMPI_MCA_plm_rsh_agent": str(shell)}
    env |= dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")
    command = mpi.command(start(bench, tmp_path), hosts=hosts)
    words = ["ip", "netns", "exec", lab.hosts[0].space, "bash", "-c", command]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    check(bench, tmp_path / "run")


SLURM = """\
ClusterName=lab
SlurmctldHost=h1
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation=/srv/slurmctld
SlurmdSpoolDir=/srv/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/srv/slurmctld.log
SlurmdLogFile=/srv/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=5,sched_interval=5
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=10
NodeName=h[1-2] CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 State=UNKNOWN
PartitionName=all Nodes=h[1-2] Default=YES MaxTime=INFINITE State=UP
"""
SLURMD = """\
mkdir -p /run/munge /srv/munge /srv/slurmctld /srv/slurmd
cp {folder}/munge.key /srv/munge/key
chown -R munge /run/munge /srv/munge; chmod 400 /srv/munge/key
runuser -u munge -- munged --force --key-file=/srv/munge/key --pid-file=/srv/munge/pid \\
  --log-file=/srv/munge/log --seed-file=/srv/munge/seed --socket=/run/munge/munge.socket.2
mount -t tmpfs cg /sys/fs/cgroup; cd /sys/fs/cgroup; mkdir systemd
mount -t cgroup -o none,name=systemd systemd systemd
for each in freezer cpuset memory cpuacct cpu devices; do
  mkdir $each; mount -t cgroup -o $each $each $each
done
cd /; {first} slurmd
"""


def slurm_on(lab: Lab, folder: Path) -> dict[str, str]:
    """Start it on all hosts; what its commands need in their environment."""
    (folder / "slurm.conf").write_text(SLURM)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    env = {**ENV, "SLURM_CONF": str(folder / "slurm.conf")}
    for host in lab.hosts:
        first = "slurmctld;" if host is lab.hosts[0] else ""
        host.run("bash", "-c", SLURMD.format(folder=folder, first=first), env=env)
    return env


@needs("slurmctld", "slurmd", "munged", "sbatch")
def test_slurm(bench: Bench, lab: Lab, tmp_path: Path) -> None:
    env, first = slurm_on(lab, tmp_path), lab.hosts[0]
    (tmp_path / "job.sh").write_text(slurm.script(start(bench, tmp_path)))
    log = tmp_path / "job.log"
    first.run("sbatch", "--output", log, tmp_path / "job.sh", env=env)
    deadline = time.monotonic() + 600
    while first.run("squeue", "-h", env=env).strip():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    assert "h1" in first.run("sinfo", "-h", "-N", env=env)
    check(bench, tmp_path / "run")


def ray_on(host: Host, head: Host, env: dict[str, str]) -> None:
    words = ["--node-ip-address", host.address, "--num-cpus", "1", "--disable-usage-stats"]
    words += ["--object-store-memory", "80000000", "--block"]
    if host is head:
        words += ["--head", "--port", "6379", "--include-dashboard=false"]
    else:
        words += ["--address", f"{head.address}:6379"]
    quiet = subprocess.DEVNULL
    host.start("ray", "start", *words, env=env, stdout=quiet, stderr=quiet)


@needs("ray")
def test_ray(bench: Bench, lab: Lab, tmp_path: Path) -> None:
    """The driver, by the Python that has ray: it imports nothing of shoal."""
    head = lab.hosts[0]
    for host in lab.hosts:
        ray_on(host, head, ENV)
    (tmp_path / "driver.py").write_text(ray.driver(start(bench, tmp_path), cpus=1))
    program = shutil.which("ray")
    assert program is not None
    python = Path(program).with_name("python")
    env = {**ENV, "RAY_ADDRESS": f"{head.address}:6379"}
    for _ in range(60):
        known = head.start("ray", "status", env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if known.communicate()[0].count("node_") >= 2:
            break
        time.sleep(2)
    log = tmp_path / "driver.log"
    with log.open("w") as file:
        driver = head.start(python, tmp_path / "driver.py", env=env, stdout=file, stderr=file)
    assert driver.wait(timeout=600) == 0, log.read_text()[-4000:]
    check(bench, tmp_path / "run")


def played(bench: Bench, lab: Lab, folder: Path, *words: str) -> Job:
    """The printed Job on the lab's hosts."""
    secret, claim = folder / "secret", folder / "claim"
    for each in (secret, claim, folder / "pods"):
        each.mkdir()
    (secret / "keys").write_text("ab" * 32 + "\n")
    (secret / "keys").chmod(0o400)
    out, keys = folder / "runs" / "run", folder / "keys" / "keys"
    begin = Start(str(bench.recipe), words or WORDS, out, 2, keys, AGENT_PORT)
    text = kubernetes.manifests(begin, name="tiny", image="none", claim="runs")
    secrets, claims = {"tiny-keys": secret}, {"runs": claim}
    return Job(text, lab, folder=folder / "pods", env=ENV, secrets=secrets, claims=claims)


def test_kubernetes_played(bench: Bench, lab: Lab, tmp_path: Path) -> None:
    job = played(bench, lab, tmp_path)
    assert job.wait(seconds=600) == [0, 0], job.said()
    check(bench, tmp_path / "claim" / "run")


def test_kubernetes_played_with_a_mistake(bench: Bench, lab: Lab, tmp_path: Path) -> None:
    """Exit status 2 fails the Job: it is not begun again."""
    job = played(bench, lab, tmp_path, "train.steps=none")
    status = job.wait(seconds=600)
    assert job.failed and status[0] == 2 and job.failures[0] == 1, job.said()


@needs("kubernetes-validate")
@pytest.mark.parametrize("version", ["1.32.0", "1.36.0"])
def test_manifests_by_the_schema_of_kubernetes(bench: Bench, tmp_path: Path, version: str) -> None:
    begin = Start(str(bench.recipe), WORDS, Path("/runs/run"), 2, Path("/secret/keys"), AGENT_PORT)
    text = kubernetes.manifests(begin, name="tiny", image="none", claim="runs")
    (tmp_path / "job.yaml").write_text(text)
    words = ["kubernetes-validate", "-k", version, "--strict", str(tmp_path / "job.yaml")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "job.yaml").write_text(text.replace("backoffLimitPerIndex", "backofLimitPerIndex"))
    wrong = subprocess.run(words, capture_output=True, text=True)
    assert wrong.returncode != 0, json.dumps("a key that there is not")
