"""shoal trains transformer models in parallel and proves that the run is the one you asked for."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__"]
