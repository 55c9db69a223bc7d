"""YAML as data: version 1.2's plain scalars, no key twice in one mapping, and text that reads back.

PyYAML follows YAML 1.1, where `off` is False, `1e-3` is text, `1:30` is 90 and a date is an
object; a recipe that says `dropout: off` means the word (https://yaml.org/spec/1.2.2/, 10.3.2).
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from shoal.errors import UserError

_PLAIN = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", r"<<", "<"),
)
"""Tag, pattern and first characters of the scalars that are not text."""


_MOST_DEPTH = 64
_MOST_ALIASES = 20
"""Aliases of aliases multiply: so many stand for at most e^(20/e), 1,600 times their text."""
_LARGEST = 2**63


class _Loader(yaml.SafeLoader):
    """Scalars by YAML 1.2's core schema; what is no value of its tag is the writer's mistake."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012
    depth = aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One node with all below it. Raises UserError for too many levels or aliases."""
        self.depth += 1
        self.aliases += self.check_event(yaml.AliasEvent)
        line = self.peek_event().start_mark.line + 1
        if self.depth > _MOST_DEPTH:
            raise UserError(f"line {line}: nested more than {_MOST_DEPTH} deep")
        if self.aliases > _MOST_ALIASES:
            raise UserError(f"line {line}: more than {_MOST_ALIASES} aliases; write the values out")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node. Raises UserError for text that its tag does not fit."""
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError):
            kind, text = node.tag.rpartition(":")[2], str(node.value)[:40]
            line = node.start_mark.line + 1
            raise UserError(f"line {line}: {text!r} cannot be read as {kind}") from None


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would take for something else."""


for _tag, _pattern, _first in _PLAIN:
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
        )


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    seen: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str | int | float | bool | None):
            raise UserError(f"line {line}: expected a word as key, got {type(key).__name__}")
        if key in seen:
            raise UserError(f"line {line}: the key {key!r} is given twice; keep one of them")
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    number = int(text[2:] if base != 10 else text, base)
    if abs(number) > _LARGEST:
        raise OverflowError
    return number


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


_BREAKS = re.compile("[\\x85\\u2028\\u2029]")
"""Line breaks of Unicode, which PyYAML writes bare and then reads as a space."""


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    style = '"' if _BREAKS.search(value) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def parse(text: str) -> Any:
    """The value of `text`. Raises yaml.YAMLError or UserError, which names the line."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        # deep: an alias of what it stands in is refused
        return None if node is None else loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def read_mapping(text: str, *, source: str) -> dict[str, Any]:
    """A mapping from `text`. Raises UserError that names `source` and the line."""
    try:
        value = parse(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}, line {mark.line + 1}" if mark is not None else source
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise UserError(f"{where}: not valid YAML: {reason}") from None
    except UserError as error:
        raise UserError(f"{source}, {error}") from None
    if not isinstance(value, dict):
        got = "nothing" if value is None else type(value).__name__
        raise UserError(
            f"{source}: expected a mapping of sections (model:, data:, train:), got {got}"
        )
    return value


def one_line(value: Any) -> str:
    """A value as text on one line that `parse` reads back."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=1 << 30
    )
    return text.removesuffix("\n").removesuffix("\n...")


def dump(tree: dict[str, Any]) -> str:
    """`tree` as text that `parse` reads back to an equal tree; keys stay in order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
