"""What torchrun does when one of two hosts is switched off in silence, in the lab of tests/hosts.

    python benchmarks/hosts_torchrun.py [--wait 320]

Elastic (`--nnodes=1:2 --max-restarts=3`, c10d rendezvous on the first host), a loop of
DistributedDataParallel over gloo. Prints the seconds from the loss to the next step, if there is
one, and what the launcher did. Root only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from hosts.lab import Host, Lab

LOOP = """\
import time
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(64, 64))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
step = 0
while True:
    model(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    if dist.get_rank() == 0 and step % 10 == 0:
        print("step", step, "of", dist.get_world_size(), time.monotonic(), flush=True)
    time.sleep(0.02)
"""


def started(host: Host, *, at: str, folder: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1"]
    words += ["--rdzv-backend=c10d", f"--rdzv-endpoint={at}:29400", "--rdzv-id=run"]
    words += ["--max-restarts=3", f"--local-addr={host.address}", folder / "loop.py"]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    with (folder / f"{host.name}.log").open("w") as log:
        return host.start(*words, env=env, stdout=log, stderr=subprocess.STDOUT)


def steps(folder: Path) -> list[str]:
    found = (folder / "h1.log").read_text().splitlines()
    return [line for line in found if line.startswith("step ")]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--wait", type=float, default=320.0)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as name, Lab(2, Path(name) / "lab") as lab:
        folder = Path(name)
        (folder / "loop.py").write_text(LOOP)
        first, second = lab.hosts
        launchers = [started(host, at=first.address, folder=folder) for host in (first, second)]
        deadline = time.monotonic() + 90
        while not any("of 2" in line for line in steps(folder)[5:]):
            assert time.monotonic() < deadline, (folder / "h1.log").read_text()[-2000:]
            time.sleep(0.2)
        second.power_off()
        began, before = time.monotonic(), len(steps(folder))
        while time.monotonic() - began < given.wait:
            if len(steps(folder)) > before + 1 or launchers[0].poll() is not None:
                break
            time.sleep(0.2)
        waited = time.monotonic() - began
        more = len(steps(folder)) - before
        status = launchers[0].poll()
        print(f"{waited:.1f} s after the loss: {10 * more} more steps, launcher {status}")
        print("\n".join(line[:200] for line in (folder / "h1.log").read_text().splitlines()[-12:]))


if __name__ == "__main__":
    main()
