"""Recipes from YAML: read, apply dotted overrides, report every problem at once, write back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from shoal.config.recipe import Recipe
from shoal.errors import ConfigError, Problem, UserError, nearest

_COMING = {
    "sync.kind": "local-sgd, diloco and server policies are not there yet",
    "sync.codec.kind": "codecs are not there yet",
    "task.kind": "other tasks are not there yet",
}


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML as data, with a key given twice in one mapping refused instead of silently dropped."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    seen: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            line = key_node.start_mark.line + 1
            raise UserError(f"line {line}: the key {key!r} is given twice; keep one of them")
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with shoal."""
    folder = resources.files("shoal.recipes")
    return sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))


def read_yaml(text: str, *, source: str) -> dict[str, Any]:
    """A YAML mapping from `text`. Raises UserError that names `source` and the line."""
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark is not None else source
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    except UserError as error:
        raise UserError(f"{source}, {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{source}: expected a mapping of sections, got {type(value).__name__}")
    return value


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
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key.strip():
            problems.append(Problem(text, "expected key=value, such as parallel.replicate=2"))
            continue
        try:
            value = yaml.load(raw, Loader=_UniqueKeyLoader) if raw.strip() else None
        except (yaml.YAMLError, UserError):
            problems.append(Problem(key, f"{raw!r} is not a valid value"))
            continue
        _set(tree, key.strip().split("."), value)
    if problems:
        raise ConfigError(problems, source="the overrides")
    return tree


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    here = tree
    for depth, part in enumerate(path[:-1]):
        below = here.get(part)
        if path[: depth + 1] == ["parallel"] and below in ("auto", None):
            below = {"auto": True}  # a key set on auto fixes it, the rest stays auto
        if not isinstance(below, dict):
            below = {}
        here[part] = dict(below)
        here = here[part]
    here[path[-1]] = value


def recipe_from(tree: Mapping[str, Any], *, source: str) -> Recipe:
    """The recipe that `tree` describes. Raises ConfigError with every problem found."""
    tree = dict(tree)
    if tree.get("parallel") == "auto":
        tree["parallel"] = {"auto": True}
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problems = [_problem(detail) for detail in error.errors(include_url=False)]
        raise ConfigError(_unique(problems), source=source) from None


def _unique(problems: list[Problem]) -> list[Problem]:
    return list(dict.fromkeys(problems))


def _problem(detail: ErrorDetails) -> Problem:
    kinds = {"causal-lm", "token-classification", "config", "pretrained", "adamw", "muon"}
    kinds |= {"constant", "linear", "cosine", "warmup-stable-decay", "every-step", "none"}
    path = [str(part) for part in detail["loc"]]
    # pydantic names the chosen alternative in the path; people did not write it.
    shown = [p for i, p in enumerate(path) if not (i > 0 and p in kinds)]
    shown = [p for p in shown if p not in {"constrained-int", "str", "literal['auto']", "int"}]
    shown = [p for p in shown if not p.startswith(("tuple[", "function-", "literal["))]
    where = ".".join(shown) or "recipe"
    got = detail.get("input")
    if detail["type"] == "extra_forbidden":
        return Problem(where, "unknown key", nearest(path[-1], _keys_at(path[:-1])))
    if detail["type"] == "missing":
        return Problem(where, "required, and not given")
    if detail["type"] == "union_tag_not_found":
        return Problem(where, "`kind` is required", str(detail.get("ctx", {}).get("tags", "")))
    if detail["type"] == "union_tag_invalid":
        context = detail.get("ctx", {})
        expected = str(context.get("expected_tags", "")).replace("'", "")
        hint = _COMING.get(f"{where}.kind", "")
        return Problem(f"{where}.kind", f"expected {expected}; got {context.get('tag')!r}", hint)
    if detail["type"] == "value_error":
        return Problem(where, detail["msg"].removeprefix("Value error, "))
    message = detail["msg"][0].lower() + detail["msg"][1:]
    message = message.replace("input should be", "expected")
    got_text = repr(got) if not isinstance(got, dict | list) else type(got).__name__
    return Problem(where, f"{message}; got {got_text}", _COMING.get(where, ""))


def _keys_at(path: list[str]) -> list[str]:
    """Known keys of the section that `path` leads to (alternatives chosen by their kind)."""
    models: list[Any] = [Recipe]
    for part in path:
        found: list[Any] = []
        for model in models:
            if isinstance(model, type) and issubclass(model, BaseModel):
                field = model.model_fields.get(part)
                if field is not None:
                    found += _models_in(field.annotation)
                elif "kind" in model.model_fields:
                    tags = get_args(model.model_fields["kind"].annotation)
                    found += [model] if part in tags else []
                else:
                    found.append(model)
        models = found
    return [key for model in models for key in model.model_fields]


def _models_in(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def load_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe by shipped name or path, with dotted overrides applied.

    Raises UserError (no such recipe, not YAML) or ConfigError (every problem in one report).
    """
    text, source = recipe_text(name_or_path)
    tree = apply_overrides(read_yaml(text, source=source), overrides)
    return recipe_from(tree, source=source)


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal recipe."""
    tree = recipe.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)
