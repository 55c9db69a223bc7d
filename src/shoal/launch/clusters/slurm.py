"""Slurm: a script for sbatch. A host that is lost does not end the job; preempted, it saves first.

Ports of jobs differ, so that two on one host do not meet.
"""

from __future__ import annotations

from dataclasses import replace

from shoal.launch.clusters.start import Start, waits

_SCRIPT = """\
#!/bin/bash
#SBATCH --nodes={nodes} --ntasks-per-node=1
#SBATCH --requeue --open-mode=append --no-kill
#SBATCH --signal=USR1@120
set -u
port=$(({port} + SLURM_JOB_ID % 10000))
hosts={hosts}.$SLURM_JOB_ID
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/:$port/" > "$hosts"
srun --no-kill --kill-on-bad-exit=0 --wait=0 {agent} --port $port & agents=$!
{coordinator} --hosts "$hosts" & run=$!
trap 'kill -TERM $run' TERM USR1
{waits}
kill -TERM $agents 2>/dev/null; wait
rm -f "$hosts"
if [ $status = 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $status
"""
_PORT = 20000


def script(start: Start) -> str:
    """What to give to sbatch. It may be run again: it goes on with what is there."""
    agent, _, keys = replace(start, port=0).agent.partition(" --port 0")
    coordinator = start.coordinator("HOSTS").replace(" --hosts HOSTS", "")
    return _SCRIPT.format(
        nodes=start.num_hosts,
        port=_PORT,
        hosts=f"{start.keys}.hosts",
        agent=agent + keys,
        coordinator=coordinator,
        waits=waits("run"),
    )
