"""The rules of SECURITY.md, each with its test; processes are started as in tests/fault."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "fault"))
