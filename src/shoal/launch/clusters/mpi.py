"""MPI as a starter: mpirun begins one agent on each host, and the run goes on without MPI."""

from __future__ import annotations

import shlex
from pathlib import Path

from shoal.launch.clusters.start import Start


def command(start: Start, *, hosts: Path) -> str:
    """For Open MPI. `hosts`: the file with a line HOST for each (clusters/hosts_file.py)."""
    first = '[ "${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-none}}" = 0 ]'
    words = ["mpirun", "-n", str(start.num_hosts), "--map-by", "ppr:1:node", "--bind-to", "none"]
    words += ["--hostfile", str(hosts), "bash", "-c", start.on_every_host(first, hosts=str(hosts))]
    return shlex.join(words)
