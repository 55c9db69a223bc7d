"""The schema of a recipe, walked: which sections have several kinds, and every key there is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, Discriminator

from shoal.config.recipe import Recipe


@dataclass(frozen=True)
class Choice:
    """A section that is one of several kinds."""

    path: tuple[str, ...]
    kinds: dict[str, type[BaseModel]]
    default: str | None
    """The kind in force where the recipe has no such section; None: it must have one."""

    def kind_of(self, section: dict[str, Any]) -> str | None:
        """The kind of a section that names none: the default, or the one whose key it has."""
        if self.default is not None:
            return self.default
        named = [
            kind
            for kind, model in self.kinds.items()
            if any(f.is_required() and n in section for n, f in model.model_fields.items())
        ]
        return named[0] if len(named) == 1 else None


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a value may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def kinds_of(model: Any) -> tuple[str, ...]:
    """The words that `kind` may be in a section."""
    field = model.model_fields.get("kind")
    return get_args(field.annotation) if field is not None else ()


@cache
def choices() -> tuple[Choice, ...]:
    """Every section of several kinds; an outer one before those inside it."""
    return tuple(_choices(Recipe, ()))


@cache
def keys() -> dict[str, tuple[str, ...]]:
    """Every dotted key, with the kinds of its section that have it."""
    found: dict[str, tuple[str, ...]] = {}
    for path, model in _sections(Recipe, ()):
        for name in model.model_fields:
            key = ".".join((*path, name))
            found[key] = (*found.get(key, ()), *kinds_of(model))
    return found


def _sections(
    model: type[BaseModel], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    yield path, model
    for name, field in model.model_fields.items():
        for inner in models_in(field.annotation):
            yield from _sections(inner, (*path, name))


def _choices(model: type[BaseModel], path: tuple[str, ...]) -> Iterator[Choice]:
    for name, field in model.model_fields.items():
        inside, where = models_in(field.annotation), (*path, name)
        if field.discriminator or any(isinstance(m, Discriminator) for m in field.metadata):
            kinds = {kind: each for each in inside for kind in kinds_of(each)}
            yield Choice(where, kinds, getattr(field.default, "kind", None))
        for each in inside:
            yield from _choices(each, where)
