"""Imports what a recipe names by its path, from where the user lets Python look, nowhere else."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from types import ModuleType

from shoal.environment import python_path
from shoal.errors import ConfigError, Problem

_ONE = threading.RLock()
"""Workers may be threads, and share the path."""


def imported(module: str, *, named: str, key: str) -> ModuleType:
    """A module; never from the folder that one is in, unless PYTHONPATH has it.

    A recipe from elsewhere may come with a file beside it. `named`: what the recipe says under
    `key`. Raises ConfigError.
    """
    with _ONE:
        before, here = list(sys.path), {"", os.getcwd()} - set(python_path())
        sys.path[:] = [each for each in before if each not in here]
        try:
            return importlib.import_module(module)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            hint = "install it, or let PYTHONPATH name its folder; shoal looks nowhere else"
            raise ConfigError([Problem(key, f"{named!r}: {said}", hint)]) from error
        finally:
            sys.path[:] = before
