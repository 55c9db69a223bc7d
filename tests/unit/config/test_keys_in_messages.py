"""No message names a key that a recipe cannot have: whoever follows it would be refused again."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from shoal.config.recipe import Recipe

SOURCES = Path(__file__).resolve().parents[3] / "src" / "shoal"
SECTIONS = [name for name in Recipe.model_fields if name != "seed"]
KEY = re.compile(rf"(?<![\w.])(?:{'|'.join(SECTIONS)})\.[a-z_]+(?:\.[a-z_]+)*")
NO_KEYS = {"train.counts", "parallel.apply"}
"""A file of prepared data; a module, in a message for developers."""
MOVED = {"data.validation_fraction"}


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def exists(key: str) -> bool:
    models: list[type[BaseModel]] = [Recipe]
    for part in key.split("."):
        if any(model.model_config.get("extra") == "allow" for model in models):
            return True  # keys of a model's own configuration
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        if not fields:
            return False
        models = [model for field in fields for model in models_in(field.annotation)]
    return True


def named_keys() -> dict[str, str]:
    """Every key that a text of the sources names, but for docstrings, with a place."""
    found = {}
    for path in sorted(SOURCES.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                keys = [] if id(node) in prose else KEY.findall(node.value)
                found.update(dict.fromkeys(keys, f"{path.name}:{node.lineno}"))
    return found


def test_every_key_in_a_message_exists() -> None:
    assert exists("data.text_field") and exists("data.validation.source")
    assert not exists("data.text_column") and not exists("train.optimizer.lr")
    keys = named_keys()
    assert len(keys) > 40
    wrong = {key: place for key, place in keys.items() if not exists(key)}
    assert set(wrong) - NO_KEYS - MOVED == set(), wrong
