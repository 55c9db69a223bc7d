"""What a recipe leaves out: the kind of a section, and what is usual for weights that exist."""

from __future__ import annotations

from typing import Any

from shoal.config.schema import choices

FINE_TUNING = {"learning_rate": 2.0e-5, "weight_decay": 0.01}
"""Of AdamW with pretrained weights: BERT's grid has 2e-5 to 5e-5 (https://arxiv.org/abs/1810.04805,
A.3); 1e-3, right for random weights, destroys what they know."""
ADAPTER_RATE = 2.0e-4
"""Of adapters, whose matrices begin anew: QLoRA's for small models (https://arxiv.org/abs/2305.14314,
table 9)."""
FINE_TUNING_WARMUP = 0.03
"""Share of the steps, as in Alpaca's and most recipes since."""


def is_pretrained(tree: dict[str, Any]) -> bool:
    """Whether the recipe `tree` begins with weights that exist."""
    model = tree.get("model")
    return (
        isinstance(model, dict)
        and model.get("kind", "pretrained") == "pretrained"
        and ("path" in model)
    )


def usual_rate(*, adapted: bool) -> float:
    """Of AdamW with pretrained weights: for all of them, or for adapters beside them."""
    return ADAPTER_RATE if adapted else FINE_TUNING["learning_rate"]


def with_kinds(tree: dict[str, Any]) -> dict[str, Any]:
    """`tree` with the kind of every section that names none; changed in place."""
    for choice in choices():
        section: Any = tree
        for part in choice.path:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and "kind" not in section:
            kind = choice.kind_of(section)
            if kind is not None:
                rest = dict(section)
                section.clear()
                section.update({"kind": kind, **rest})
    return tree


def with_fine_tuning(tree: dict[str, Any]) -> list[tuple[str, str]]:
    """Fill in the defaults of fine-tuning where `tree` begins with weights.

    Returns what was filled in: (section of train, key).
    """
    train = tree.get("train")
    if not is_pretrained(tree) or not isinstance(train, dict):
        return []
    filled = []
    optimizer = train.setdefault("optimizer", {"kind": "adamw"})
    if isinstance(optimizer, dict) and optimizer.get("kind") == "adamw":
        adapted = tree["model"].get("adapter") is not None
        usual = FINE_TUNING | {"learning_rate": usual_rate(adapted=adapted)}
        filled = [("optimizer", key) for key in usual if key not in optimizer]
        train["optimizer"] = usual | optimizer
    schedule = train.setdefault("schedule", {"kind": "cosine"})
    if isinstance(schedule, dict) and not {"warmup_steps", "warmup_fraction"} & schedule.keys():
        schedule["warmup_fraction"] = FINE_TUNING_WARMUP
        filled.append(("schedule", "warmup_fraction"))
    return filled
