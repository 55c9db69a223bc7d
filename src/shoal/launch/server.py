"""`shoal serve`: from a model folder to a server that runs until a signal."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from shoal import __version__
from shoal.config.serve import ServeSection
from shoal.environment import usable_cores
from shoal.errors import RunError
from shoal.launch.other_engine import Children, command_for
from shoal.launch.pool import WorkerPool
from shoal.launch.serving import Fleet, listen, needs_extra, open_service
from shoal.launch.serving_layout import settled
from shoal.launch.serving_record import Record, held_record


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
    if settings.engine != "shoal":
        _pass_on(model, settings=settings, phase=phase, say=say, began=began)
        return
    folder, _, make = open_service(model, settings=settings)
    with (
        held_record(settings.record) as record,
        listen(settings) as listening,
        WorkerPool(usable_cores()) as pool,
        Fleet(folder, settled(folder, settings, pool=pool, phase=phase), pool, say=say) as fleet,
    ):
        phase(f"reading {folder}")
        fleet.wait_ready()
        phase(str(fleet.facts["products"]))
        began()
        host, port = listening.getsockname()[:2]
        address = f"http://{host}:{port}/v1"
        app = make(fleet)
        about = {"model": str(folder), "address": address, "threads": fleet.threads}
        with nullcontext() if record is None else Record(record, fleet, about=about, say=say):
            say(
                f"serving {folder} at {address} with {fleet.num_replicas} replica(s) of "
                f"{fleet.threads} thread(s)"
            )
            _server(app).run(sockets=[listening])


def _pass_on(
    model: Path,
    *,
    settings: ServeSection,
    phase: Callable[[str], None],
    say: Callable[[str], None],
    began: Callable[[], None],
) -> None:
    """Serve by another engine until a signal, or until none of its servers can be started."""
    count = 1 if settings.replicate == "auto" else settings.replicate
    command = command_for(settings, model, replicas=count)
    with needs_extra():
        from shoal.serve.http.guard import read_keys
        from shoal.serve.http.passing import make_passing_app
    keys = read_keys(settings.keys)
    with listen(settings) as listening, Children(command, count=count, say=say) as servers:
        phase(f"{settings.engine} reads {model}")
        servers.wait_ready()
        began()
        host, port = listening.getsockname()[:2]
        say(
            f"serving {model} at http://{host}:{port}/v1 with {count} server(s) of "
            f"{settings.engine}; that answers do not depend on company is not proved of it"
        )
        engine, limits = settings.engine, settings.limits
        server = _server(
            make_passing_app(servers, engine=engine, keys=keys, limits=limits, version=__version__)
        )

        def lost() -> None:
            server.should_exit = True

        servers.lost = lost
        server.run(sockets=[listening])
        if servers.failed is not None:
            raise RunError(servers.failed)


def _server(app: Any) -> Any:
    """A server of `app` that ends in order at a signal."""
    import uvicorn

    # uvicorn answers a signal by ending in order, and then raises it again: not to us
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
