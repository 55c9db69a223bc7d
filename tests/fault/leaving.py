"""One rank leaves at once while it still refers to its groups; the other waits on one of them.

Run as a script: `python leaving.py STORE RANK`. Rank 0 prints how long it waited.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from shoal.comm.group import ProcessGroup, watched
from shoal.errors import PeersLost
from shoal.runtime import new_group, start_process_group, stop_process_group

if __name__ == "__main__":
    store, rank = Path(sys.argv[1]), int(sys.argv[2])
    cpu = torch.device("cpu")
    start_process_group(rank=rank, size=2, device=cpu, meeting=store.as_uri(), timeout_seconds=60)
    kept = new_group([0, 1])
    ProcessGroup(kept).barrier()
    if rank:
        stop_process_group(at_once=True)
        time.sleep(20)  # alive, and `kept` is kept
    else:
        began = time.monotonic()
        try:
            watched(lambda: dist.all_reduce(torch.zeros(()), group=kept))
        except PeersLost:
            print(time.monotonic() - began)
