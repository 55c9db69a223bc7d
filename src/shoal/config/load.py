"""Recipes from YAML: read, apply dotted overrides, report every problem at once, write back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from shoal.config.problems import problems_of
from shoal.config.recipe import Recipe
from shoal.config.yaml_text import dump, parse, read_mapping
from shoal.errors import ConfigError, Problem, UserError, nearest


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with shoal."""
    folder = resources.files("shoal.recipes")
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))


def recipe_text(name_or_path: str) -> tuple[str, str]:
    """Text and a printable source of a shipped recipe or a YAML file. Raises UserError."""
    if name_or_path in shipped_recipes():
        text = resources.files("shoal.recipes").joinpath(f"{name_or_path}.yaml").read_text()
        return text, f"recipe {name_or_path}"
    path = Path(name_or_path)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except UnicodeDecodeError:
            raise UserError(f"{path}: expected a YAML text file, got binary data") from None
    if path.is_dir():
        raise UserError(f"{path}: expected a recipe, got a folder; name a YAML file in it")
    if path.suffix in {".yaml", ".yml"} or "/" in name_or_path:
        here = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such recipe file; {nearest(path.name, here)}".rstrip("; "))
    raise UserError(
        f"no recipe named {name_or_path!r}; {nearest(name_or_path, shipped_recipes())} "
        "Or give the path of a YAML file."
    )


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`tree` with each `dotted.key=value` set; values are YAML. Raises ConfigError."""
    problems: list[Problem] = []
    overrides = list(overrides)
    if any(text.startswith("data.validation.") for text in overrides):
        data = tree.get("data")  # a way that is given takes the place of the recipe's
        kept = data.items() if isinstance(data, dict) else ()
        tree["data"] = {key: value for key, value in kept if key != "validation"}
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key.strip():
            problems.append(Problem(text, "expected key=value, such as parallel.replicate=2"))
            continue
        try:
            value = parse(raw) if raw.strip() else None
        except (yaml.YAMLError, UserError):
            problems.append(Problem(key, f"{raw!r} is not a valid value"))
            continue
        _set(tree, key.strip().split("."), value)
    if problems:
        raise ConfigError(problems, source="the overrides")
    return tree


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    if path == ["model", "path"]:  # weights that exist instead of what the recipe describes
        before = tree.get("model")
        kept = before.get("dropout") if isinstance(before, dict) else None
        tree["model"] = {} if kept is None else {"dropout": kept}
    here = tree
    for depth, part in enumerate(path[:-1]):
        below = here.get(part)
        if path[: depth + 1] == ["parallel"] and below in ("auto", None):
            below = {"auto": True}  # a key set on auto fixes it, the rest stays auto
        if path[0] == "parallel" and depth == 1 and type(below) is int:
            below = {"degree": below}  # an axis given as an integer gets settings of its own
        if not isinstance(below, dict):
            below = {}
        here[part] = dict(below)
        here = here[part]
    here[path[-1]] = value


def recipe_from(tree: Mapping[str, Any], *, source: str) -> Recipe:
    """The recipe that `tree` describes. Raises ConfigError with every problem found."""
    tree = _with_kinds(dict(tree))
    if tree.get("parallel") == "auto":
        tree["parallel"] = {"auto": True}
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(problems_of(error), source=source) from None


_KINDS_IN_FORCE = {
    ("task",): "causal-lm",
    ("train", "optimizer"): "adamw",
    ("train", "schedule"): "cosine",
    ("sync",): "every-step",
}
"""The kind that a section has which names none: that of its default."""


def _with_kinds(tree: dict[str, Any]) -> dict[str, Any]:
    """Sections of several kinds that name none keep the one in force; a path means pretrained."""
    model = tree.get("model")
    if isinstance(model, dict) and "kind" not in model:
        found = {"path": "pretrained", "architecture": "config"}
        kinds = [kind for key, kind in found.items() if key in model]
        tree["model"] = {"kind": kinds[0], **model} if len(kinds) == 1 else model
    for path, kind in _KINDS_IN_FORCE.items():
        above: Any = tree
        for part in path[:-1]:
            below = above.get(part)
            if isinstance(below, dict):
                above[part] = dict(below)
            above = above[part] if isinstance(below, dict) else {}
        section = above.get(path[-1])
        if isinstance(section, dict) and "kind" not in section:
            above[path[-1]] = {"kind": kind, **section}
    return tree


def load_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe by shipped name or path, with dotted overrides applied.

    Raises UserError (no such recipe, not YAML) or ConfigError (every problem in one report).
    """
    text, source = recipe_text(name_or_path)
    tree = apply_overrides(read_mapping(text, source=source), overrides)
    return recipe_from(tree, source=source)


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return dump(_tree(recipe))


def _tree(section: BaseModel) -> dict[str, Any]:
    """Plain data. None is left out only where it is the default, else it would not come back."""
    tree: dict[str, Any] = {}
    plain = section.model_dump(mode="json")
    for key, value in section:
        field = type(section).model_fields.get(key)
        if isinstance(value, BaseModel):
            tree[key] = _tree(value)
        elif value is not None or field is None or field.default is not None:
            tree[key] = plain[key]
    return tree
