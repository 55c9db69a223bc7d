"""What pydantic finds wrong with a recipe, said once, in the words and key paths of the recipe."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from shoal.config.recipe import Recipe
from shoal.config.schema import choices, kinds_of, models_in
from shoal.config.suggest import suggestion
from shoal.config.tasks import OWN, SHIPPED, installed_tasks
from shoal.errors import Problem, nearest

_HINTS = {
    "parallel": "auto, or degrees such as {replicate: 2}",
    "sync.codec.kind": "local-sgd and gossip take none; streaming-diloco no topk or powersgd",
    "task.kind": "any other is a class of your own (docs/contribute/new-task.md)",
}
_MOVED = {"data.validation_fraction": "it is data.validation={fraction: ...} now"}
"""Keys of older recipes, and what takes their place."""

_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section with keys of its own",
    "model_type": "a section with keys of its own",
    "model_attributes_type": "a section with keys of its own",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "literal_error": "{expected}",
}
"""What was expected, by pydantic's type of error, filled in from the error's context."""


def problems_of(error: ValidationError) -> list[Problem]:
    """Every problem once, in the order of the recipe's keys.

    Where a key takes one of several kinds of value, what they expect is joined by "or"; when a
    list or section was given, only what is wrong inside it is said.
    """
    expected: dict[str, list[str]] = {}
    got: dict[str, Any] = {}
    found: list[tuple[str, Problem | None]] = []
    for detail in error.errors(include_url=False):
        where, models = _place([str(part) for part in detail["loc"]])
        phrase = _EXPECTED.get(detail["type"])
        if phrase is None:
            found.append((where, _other(detail, where=where, models=models)))
            continue
        if where not in expected:
            expected[where], got[where] = [], detail["input"]
            found.append((where, None))
        expected[where].append(phrase.format(**(detail.get("ctx") or {})))
    places = [where for where, _ in found]
    problems = []
    for where, problem in found:
        inside = any(other.startswith(f"{where}.") for other in places)
        if problem is None and inside and isinstance(got[where], list | tuple | dict):
            continue
        problems.append(
            problem or _wrong(where, expected=list(dict.fromkeys(expected[where])), got=got[where])
        )
    return list(dict.fromkeys(problems))


def _wrong(where: str, *, expected: list[str], got: Any) -> Problem:
    shown = "nothing" if got is None else short(got)
    if isinstance(got, dict | list | tuple):
        shown = "a section" if isinstance(got, dict) else "a list"
    kinds = [kind for each in choices() if ".".join(each.path) == where for kind in each.kinds]
    hint = f"did you mean {where}.kind={got}?" if got in kinds else _HINTS.get(where, "")
    return Problem(where, f"expected {' or '.join(expected)}; got {shown}", hint)


def short(value: Any, *, most: int = 60) -> str:
    """`value` as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _other(detail: ErrorDetails, *, where: str, models: list[Any]) -> Problem:
    context = detail.get("ctx") or {}
    match detail["type"]:
        case "extra_forbidden":
            known = [key for model in models for key in model.model_fields]
            hint = _MOVED.get(where) or suggestion(where, known=known)
            return Problem(where, "unknown key", hint)
        case "missing":
            return Problem(where, "required, and not given")
        case "union_tag_not_found":
            tags = str(context.get("tags", "")).replace("'", "") or _tags(models)
            return Problem(f"{where}.kind", "required, and not given", f"one of: {tags}")
        case "union_tag_invalid":
            tags = str(context.get("expected_tags", "")).replace("'", "")
            tags = ", ".join([tags, *(installed_tasks() if where == "task" else ())])
            got = str(context.get("tag"))[:60]
            near = nearest(got, tags.split(", "))
            hint = near if near.startswith("did") else _HINTS.get(f"{where}.kind", near)
            return Problem(f"{where}.kind", f"expected one of {tags}; got {got!r}", hint)
    text = detail["msg"].removeprefix("Value error, ")
    return Problem(where, text)


def _tags(models: list[Any]) -> str:
    return ", ".join(tag for model in models for tag in kinds_of(model))


def _place(path: list[str]) -> tuple[str, list[Any]]:
    """The key path as a person wrote it, and the sections that hold (or are) its last key.

    pydantic puts into the path which alternative it tried: a `kind`, or the name of a type.
    """
    models: list[Any] = [Recipe]
    shown: list[str] = []
    for part in path:
        if part in (OWN, SHIPPED):
            continue
        chosen = [model for model in models if part in kinds_of(model)]
        if chosen and shown and not any(part in model.model_fields for model in models):
            models = chosen
            continue
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        if fields:
            models = [found for field in fields for found in models_in(field.annotation)]
            shown.append(part)
        elif part.isdigit() or (part == path[-1] and not _names_type(part, models)):
            shown.append(part)
    return ".".join(shown) or "recipe", models


def _names_type(part: str, models: list[Any]) -> bool:
    plain = {"int", "str", "float", "bool", "constrained-int"}
    return part in plain or "[" in part or any(part == model.__name__ for model in models)
