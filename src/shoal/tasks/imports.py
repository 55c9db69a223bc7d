"""Imports what a recipe names by its path, from where the user lets Python look, nowhere else."""

from __future__ import annotations

import importlib
from types import ModuleType

from shoal.config.tasks import not_from_here
from shoal.errors import ConfigError, Problem


def imported(module: str, *, named: str, key: str) -> ModuleType:
    """A module; never from the folder that one is in, unless PYTHONPATH has it.

    `named`: what the recipe says under `key`. Raises ConfigError.
    """
    with not_from_here():
        try:
            return importlib.import_module(module)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            hint = "install it, or let PYTHONPATH name its folder; shoal looks nowhere else"
            raise ConfigError([Problem(key, f"{named!r}: {said}", hint)]) from error
