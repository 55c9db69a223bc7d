"""The table of all families, and what is read out of a config.json by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.errors import ModelError, nearest
from shoal.legal.facts import ModelFacts
from shoal.legal.families import decoders, plain
from shoal.legal.families.family import ConfigReader, Family

FAMILIES: dict[str, Family] = {**decoders.FAMILIES, **plain.FAMILIES}

_UNKNOWN = Family()


def family_of(name: str) -> Family:
    """The entry of a family (a transformers model_type); defaults for one that is not known."""
    return FAMILIES.get(name, _UNKNOWN)


def known_families() -> tuple[str, ...]:
    """Families whose sizes can be read."""
    return tuple(name for name, each in FAMILIES.items() if each.sizes is not None)


def axes_of(name: str) -> frozenset[str]:
    """The axes a family can be cut along; an unknown family has replicate and shard only."""
    return family_of(name).axes


def facts_from_config(config: Mapping[str, Any]) -> ModelFacts:
    """Read the sizes of a model out of its config.json (a dict).

    Raises ModelError for a missing key, and for an architecture that is not known, saying what
    would be needed to know it. Of a multimodal file with a `text_config` the text part is read.
    """
    name = str(config.get("model_type", ""))
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config, name = text, str(text.get("model_type", name))
    family = family_of(name)
    if family.sizes is None:
        raise ModelError(
            f"config.json, key 'model_type': {name!r} is not an architecture whose sizes shoal "
            f"can read ({nearest(name, known_families())}). It needs an entry in legal/families "
            "that gives the parameters of one block, of the embedding and of the head "
            "(docs/contribute/new-family.md); until then train it with replicate or shard only and "
            "no plan."
        )
    return family.sizes(ConfigReader(config, family=name, keys=family.size_keys))
