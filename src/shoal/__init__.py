"""shoal trains transformer models in parallel and proves that the run is the one you asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "resume", "train"]

_PLACES = {"train": "shoal.launch.local", "resume": "shoal.launch.local"}


def __getattr__(name: str) -> Any:
    """Export lazily (PEP 562), so that `import shoal` costs nothing."""
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'shoal' has no attribute {name!r}")
