"""Writes docs/guide/recipe.md: every key of a recipe, from the schema in config/.

python scripts/recipe_reference.py           write
python scripts/recipe_reference.py --check   exit 1 when the page is not current

Types and defaults come from pydantic, meanings from the docstrings under the fields.
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pages import ROOT, write_or_check
from shoal.config import recipe as schema
from shoal.config.tasks import OWN

PAGE = ROOT / "docs" / "guide" / "recipe.md"

HEAD = """\
# Recipe: every key

Written by `scripts/recipe_reference.py` from the schema. A recipe is a YAML file with the sections
below; what is left out has its default. Any key can be set on the command line with dots between
sections (`train.optimizer.learning_rate=3e-4`), where `null` takes a value away. An unknown key is
an error. Where a section has a `kind`, the other keys depend on it, and a section without one keeps
the kind in force; an override of a `kind` keeps the keys that the recipe writes beside it.
`shoal config show RECIPE` prints a recipe with every default filled in,
`shoal config schema` the JSON schema for editors.
"""

SECTIONS = ("task", "model", "data", "train", "parallel", "sync", "precision", "checkpoint")
SECTIONS += ("launch", "observe")


def docstrings() -> dict[tuple[str, str], str]:
    """(class, field) -> the string below the field, on one line."""
    found = {}
    files = sorted(Path(schema.__file__).parent.glob("*.py"))
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    for owner in classes:
        for field, below in itertools.pairwise(owner.body):
            named = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            text = below.value if isinstance(below, ast.Expr) else None
            if named and isinstance(text, ast.Constant) and isinstance(text.value, str):
                found[owner.name, field.target.id] = " ".join(text.value.split())
    return found


DOCSTRINGS = docstrings()


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a value may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def limits(metadata: Any) -> str:
    """`, at least 1` for what an annotation demands of a number."""
    words = {
        annotated_types.Ge: ("ge", "at least"),
        annotated_types.Gt: ("gt", "above"),
        annotated_types.Le: ("le", "at most"),
        annotated_types.Lt: ("lt", "below"),
    }
    found = []
    for each in metadata:
        for one in getattr(each, "metadata", None) or [each]:
            if type(one) in words:
                name, said = words[type(one)]
                limit = getattr(one, name)
                found.append(f"{said} {'2^63' if limit == 2**63 else f'{limit:g}'}")
    return "".join(f", {each}" for each in found)


def type_words(annotation: Any, metadata: Any = ()) -> str:
    """A type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_words(arguments[0], arguments[1:])
    if origin in (Union, types.UnionType):
        parts = [type_words(each) for each in arguments if each is not type(None)]
        parts += ["null"] if type(None) in arguments else []
        return " or ".join(dict.fromkeys(parts)) + limits(metadata)
    if origin is Literal:
        return ", ".join(f"`{yaml_of(each)}`" for each in arguments)
    if origin is tuple:
        plain = "texts" if arguments[0] is str else "whole numbers"
        return f"list of {'sections' if models_in(arguments[0]) else plain}"
    if models_in(annotation):
        return "section"
    plain = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    return plain[annotation] + limits(metadata)


def yaml_of(value: Any) -> str:
    """A default as a recipe has it."""
    if isinstance(value, BaseModel):
        kind = getattr(value, "kind", None)
        given = {name: getattr(value, name) for name in value.model_fields_set}
        text = ", ".join(f"{name}: {yaml_of(each)}" for name, each in sorted(given.items()))
        return f"kind: {kind}" if kind else text or "its defaults"
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


def row(owner: type[BaseModel], name: str, field: FieldInfo) -> str:
    """One key."""
    words = type_words(field.annotation, field.metadata)
    default = "required" if field.default is PydanticUndefined else f"`{yaml_of(field.default)}`"
    if isinstance(field.default, BaseModel):
        default = yaml_of(field.default)
    owners = (each.__name__ for each in owner.__mro__)
    meaning = next(DOCSTRINGS[each, name] for each in owners if (each, name) in DOCSTRINGS)
    for python, here in (("None", "null"), ("False", "false"), ("True", "true")):
        meaning = re.sub(rf"\b{python}\b", here, meaning)
    return f"| `{name}` | {words} | {default} | {meaning} |"


def table(owner: type[BaseModel]) -> list[str]:
    """All keys of a section but the one that tells alternatives apart."""
    rows = [row(owner, n, f) for n, f in owner.model_fields.items() if n != "kind" or many(f)]
    if not rows:
        return []
    return ["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows, ""]


def many(field: FieldInfo) -> bool:
    """Whether `kind` is a choice within one section."""
    return len(get_args(field.annotation)) > 1


def about(owner: type[BaseModel]) -> str:
    """What a section is, from its docstring."""
    return " ".join((owner.__doc__ or "").split())


def section(name: str, models: list[type[BaseModel]], *, level: str = "##") -> list[str]:
    """A section, its alternatives, and the sections inside."""
    lines = [f"{level} {name}", ""]
    inner: list[str] = []
    for owner in models:
        if len(models) > 1:
            kind = owner.model_fields["kind"].default
            kind = OWN if kind is PydanticUndefined else kind
            lines += [f"**`kind: {kind}`**: {about(owner)}", ""]
        else:
            lines += [about(owner), ""]
        lines += table(owner)
        for key, field in owner.model_fields.items():
            found = models_in(field.annotation)
            where = f"{name}.{key}"
            if found and where not in inner:
                inner += [where, *section(where, found, level="###")]
    return lines + [line for line in inner if not line.startswith(f"{name}.")]


def page() -> str:
    """The whole page."""
    lines = [HEAD, "## The recipe", "", *table(schema.Recipe)]
    for name in SECTIONS:
        lines += section(name, models_in(schema.Recipe.model_fields[name].annotation))
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check({PAGE: page()}, script="recipe_reference"))
