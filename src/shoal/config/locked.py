"""What a resumed run must have in common with the run that saved."""

from __future__ import annotations

from typing import Any

LOCKED = ("seed", "task", "model", "data", "train.global_batch_samples", "train.exact")
"""Key paths: they decide what is learned from which samples. Everything else may change."""


def changed(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The locked keys that differ between two recipes (as `Recipe.model_dump(mode="json")`)."""
    return [path for path in LOCKED if _pick(saved, path) != _pick(wanted, path)]


def _pick(tree: dict[str, Any], path: str) -> Any:
    value: Any = tree
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
