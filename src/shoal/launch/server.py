"""`shoal serve`: from a model folder to a server that runs until a signal."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

from shoal.config.serve import ServeSection
from shoal.environment import usable_cores
from shoal.launch.pool import WorkerPool
from shoal.launch.serving import Fleet, listen, open_service
from shoal.launch.serving_layout import settled


def serve_forever(
    model: Path,
    *,
    settings: ServeSection,
    phase: Callable[[str], None],
    say: Callable[[str], None],
    began: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal; then answer what is being answered, and end. `began`: it is served.

    Raises what `open_service` raises, UserError for an address that cannot be had, and what a
    replica that cannot start says.
    """
    folder, _, make = open_service(model, settings=settings)
    import uvicorn

    with (
        listen(settings) as listening,
        WorkerPool(usable_cores()) as pool,
        Fleet(folder, settled(folder, settings, pool=pool, phase=phase), pool, say=say) as fleet,
    ):
        phase(f"reading {folder}")
        fleet.wait_ready()
        phase(str(fleet.facts["products"]))
        began()
        host, port = listening.getsockname()[:2]
        say(
            f"serving {folder} at http://{host}:{port}/v1 with {fleet.num_replicas} replica(s) of "
            f"{fleet.threads} thread(s)"
        )
        chosen = uvicorn.Config(make(fleet), log_level="warning", access_log=False)
        # uvicorn answers a signal by ending in order, and then raises it again: not to us
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        uvicorn.Server(chosen).run(sockets=[listening])
