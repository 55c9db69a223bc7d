"""shoal doctor: what this machine offers, and the traps it holds."""

from __future__ import annotations

from shoal.cli.terminal import say


def doctor() -> None:
    """Show what this machine offers: cores, memory, devices, formats, versions and known traps."""
    from shoal.launch.doctor import findings

    for level, text in findings():
        say(f"{level:<8} {text}")
