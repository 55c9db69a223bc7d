"""Recipes from YAML: read, apply dotted overrides, report every problem at once, write back."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from shoal.config.left_out import is_pretrained, with_fine_tuning, with_kinds
from shoal.config.problems import problems_of, short
from shoal.config.recipe import PretrainedModel, Recipe
from shoal.config.tasks import has_tokens
from shoal.config.yaml_text import dump, one_line, parse, read_mapping
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


def override_texts(overrides: str | Mapping[str, Any] | Iterable[str]) -> list[str]:
    """Overrides as KEY=VALUE, whichever way they were given. Raises UserError."""
    if isinstance(overrides, Mapping):
        return [f"{key}={one_line(_plain(value))}" for key, value in overrides.items()]
    return [overrides] if isinstance(overrides, str) else list(overrides)


def _plain(value: Any) -> Any:
    """`value` of a program as plain data. Raises UserError for what is no data."""
    try:
        return json.loads(json.dumps(value, default=os.fspath))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"a recipe is plain values (text, numbers, lists, dicts): {error}"
        ) from None


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`tree` with each `dotted.key=value` set; values are YAML. Raises ConfigError.

    A tokenizer that the recipe trains for its own model goes when an override puts weights that
    exist in the model's place: their embeddings belong to the tokenizer that comes with them.
    """
    problems: list[Problem] = []
    own_weights, named = not is_pretrained(tree), []
    overrides = list(overrides)
    if any(text.startswith("data.validation.") for text in overrides):
        data = tree.get("data")  # a way that is given takes the place of the recipe's
        kept = data.items() if isinstance(data, dict) else ()
        tree["data"] = {key: value for key, value in kept if key != "validation"}
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key.strip():
            problems.append(Problem(text[:60], "expected key=value, such as parallel.replicate=2"))
            continue
        try:
            value = parse(raw) if raw.strip() else None
        except (yaml.YAMLError, UserError) as error:
            reason = str(error) if isinstance(error, UserError) else ""
            problems.append(Problem(key, f"{short(raw)} is not a valid value", reason))
            continue
        named.append(key.strip())
        _set(tree, key.strip().split("."), value)
    if problems:
        raise ConfigError(problems, source="the overrides")
    if own_weights and is_pretrained(tree) and not any(map(_states_tokenizer, named)):
        data = dict(tree["data"]) if isinstance(tree.get("data"), dict) else {}
        tokenizer = data.pop("tokenizer", None)
        if isinstance(tokenizer, dict) and tokenizer.get("kind") == "train":
            tree["data"] = data
    return tree


def _states_tokenizer(key: str) -> bool:
    return key == "data" or key.startswith("data.tokenizer")


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    if path == ["model", "path"] and not is_pretrained(tree):  # instead of what the recipe draws
        before = tree.get("model")
        kept = before if isinstance(before, dict) else {}
        fields = PretrainedModel.model_fields.keys() - {"kind"}
        tree["model"] = {key: kept[key] for key in kept if key in fields}
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
    tree = with_kinds(copy.deepcopy(dict(tree)))
    filled = with_fine_tuning(tree)
    if tree.get("parallel") == "auto":
        tree["parallel"] = {"auto": True}
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(problems_of(error), source=source) from None
    for section, key in filled:  # nobody wrote it: with another kind or model it is another
        getattr(recipe.train, section).model_fields_set.discard(key)
    pretrained = isinstance(recipe.model, PretrainedModel)
    if pretrained and recipe.data.tokenizer.kind == "train" and has_tokens(recipe.task):
        what = "a tokenizer of its own does not fit the embeddings of a pretrained model"
        problem = Problem("data.tokenizer.kind", what, "leave it out: the model's own is used")
        raise ConfigError([problem], source=source)
    return recipe


def own_sections(parallel: Any, sync: Any) -> Recipe:
    """A recipe of which only `parallel` and `sync` mean anything: for a loop that is not shoal's.

    None leaves a section out; a policy may be given by its kind alone. Raises ConfigError.
    """
    sync = {"kind": sync} if isinstance(sync, str) else sync
    given = {"parallel": parallel, "sync": sync}
    rest = {"model": {"architecture": "any"}, "data": {"source": "any"}, "train": {"steps": 1}}
    tree = {**rest, **{key: value for key, value in given.items() if value is not None}}
    return recipe_from(_plain(tree), source="shoal.join")


def resolve(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    overrides: str | Mapping[str, Any] | Iterable[str] = (),
) -> Recipe:
    """The recipe by name, path or content, with overrides applied. Raises as `load_recipe`."""
    texts = override_texts(overrides)
    if isinstance(recipe, str | os.PathLike):
        return load_recipe(os.fspath(recipe), texts)
    if isinstance(recipe, Recipe):
        recipe = _tree(recipe, given=True)
    if not isinstance(recipe, Mapping):
        got = type(recipe).__name__
        raise UserError(f"expected a recipe: a name, a path, a dict or a shoal.Recipe; got {got}")
    return recipe_from(apply_overrides(_plain(dict(recipe)), texts), source="the recipe")


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


def _tree(section: BaseModel, *, given: bool = False) -> dict[str, Any]:
    """Plain data. None is left out only where it is the default, else it would not come back.

    `given`: only keys that somebody set, and the kind; the rest may get another default.
    """
    tree: dict[str, Any] = {}
    plain = section.model_dump(mode="json")
    for key, value in section:
        field = type(section).model_fields.get(key)
        if given and key != "kind" and key not in section.model_fields_set:
            continue
        if isinstance(value, BaseModel):
            tree[key] = _tree(value, given=given)
        elif value is not None or field is None or field.default is not None:
            tree[key] = plain[key]
    return tree
