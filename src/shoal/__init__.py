"""shoal trains transformer models in parallel and proves that the run is the one you asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "shoal.cli.api": ("Result", "evaluate", "generate", "merge", "records", "resume", "train"),
    "shoal.config.recipe": ("Recipe",),
    "shoal.fleet.fleet": ("Fleet",),
    "shoal.fleet.join": ("join",),
    "shoal.errors": (
        "CheckpointError",
        "ConfigError",
        "DataError",
        "Diverged",
        "FetchError",
        "Interrupted",
        "ModelError",
        "RunError",
        "ShoalError",
        "Stopped",
        "UserError",
        "WorkerError",
    ),
}
_PLACE_OF = {name: place for place, names in _PLACES.items() for name in names}
__all__ = sorted(["__version__", *_PLACE_OF])


def __getattr__(name: str) -> Any:
    """Export lazily (PEP 562), so that `import shoal` costs nothing."""
    if name in _PLACE_OF:
        return getattr(import_module(_PLACE_OF[name]), name)
    raise AttributeError(f"module 'shoal' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
