"""What a resumed run must have in common with the run that saved."""

from __future__ import annotations

from typing import Any

LOCKED = ("seed", "task", "model", "data", "train.global_batch_samples", "train.exact")
"""Key paths: they decide what is learned from which samples. Everything else may change."""


Difference = tuple[str, Any, Any]
"""A dotted key, its value before, and its value now."""


def differences(
    before: dict[str, Any], after: dict[str, Any], *, under: str = ""
) -> list[Difference]:
    """Every key whose value differs between two recipes, in the order of `after`."""
    found: list[Difference] = []
    for key in dict.fromkeys([*after, *before]):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, under=f"{under}{key}.")
        elif old != new:
            found.append((f"{under}{key}", old, new))
    return found


def changed(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The locked keys that differ between two recipes (as `Recipe.model_dump(mode="json")`)."""
    keys = [key for key, _, _ in differences(saved, wanted)]
    return [key for key in keys if any(f"{key}.".startswith(f"{lock}.") for lock in LOCKED)]
