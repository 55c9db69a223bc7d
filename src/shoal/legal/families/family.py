"""What shoal knows of one model family: all of it in one entry, without torch.

A family is a transformers `model_type`. What an entry leaves out is read off the model's modules
and checked on a few tokens (models/anatomy.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from shoal.errors import ModelError
from shoal.legal.facts import ModelFacts

WHOLE_BLOCKS = frozenset({"replicate", "shard"})
WITHOUT_CONTEXT = frozenset({"replicate", "shard", "tensor", "pipeline"})
EVERY_AXIS = WITHOUT_CONTEXT | {"context"}
WITH_EXPERTS = EVERY_AXIS | {"expert"}


@dataclass(frozen=True, kw_only=True)
class SizeKeys:
    """Names of the sizes in a family's configuration that `shrunk` makes small."""

    hidden: str = "hidden_size"
    inner: str = "intermediate_size"
    layers: tuple[str, ...] = ("num_hidden_layers",)
    heads: str = "num_attention_heads"
    groups: str = "num_key_value_heads"
    head_size: str = "head_dim"


class ConfigReader:
    """Reads sizes out of one config.json and names the key that is missing."""

    def __init__(self, config: Mapping[str, Any], *, family: str, keys: SizeKeys) -> None:
        self.config = config
        self.family = family
        self._keys = keys
        self.hidden = self.integer(keys.hidden)
        self.heads = self.integer(keys.heads)

    def integer(self, key: str, *, default: int | None = None) -> int:
        """The integer at `key`; raises ModelError when it is absent and has no default."""
        value = self.config.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ModelError(
                f"config.json of a {self.family} model, key {key!r}: expected a whole number, got "
                f"{value!r}. Add the key, or take the config.json that belongs to the weights."
            )
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        """The truth value at `key`."""
        value = self.config.get(key)
        return default if value is None else bool(value)

    def labels(self) -> int:
        """Number of classes of a classification head (two when the file does not say)."""
        names = self.config.get("id2label") or ()
        return len(names) if isinstance(names, Mapping) else self.integer("num_labels", default=2)

    def block(
        self,
        *,
        inner: int | None = None,
        groups: int | None = None,
        head_size: int | None = None,
        value_size: int | None = None,
    ) -> dict[str, Any]:
        """The sizes of a block, for `ModelFacts`; `groups`: key-value heads, where they are fewer.

        None: inner width and head size as the file says, key-value heads as many as heads.
        """
        size = self.hidden // self.heads if head_size is None else head_size
        return {
            "family": self.family,
            "layers": self.integer(self._keys.layers[0]),
            "hidden": self.hidden,
            "heads": self.heads,
            "key_value_heads": self.heads if groups is None else groups,
            "head_size": size,
            "value_head_size": size if value_size is None else value_size,
            "feed_forward": self.integer(self._keys.inner) if inner is None else inner,
        }

    def ends(self, *, tied: bool, rows: int = 0) -> dict[str, Any]:
        """Embedding and head of a language model, for `ModelFacts`.

        `tied`: where the file does not say; `rows`: of further tables, such as positions.
        """
        vocabulary = self.integer("vocab_size")
        tied = self.flag("tie_word_embeddings", default=tied)
        return {
            "vocabulary": vocabulary,
            "tied": tied,
            "embedding_parameters": (vocabulary + rows) * self.hidden,
            "head_parameters": 0 if tied else vocabulary * self.hidden,
        }

    def head_kind(self, *, default: str) -> str:
        """The class named in `architectures`, or `default`."""
        named = self.config.get("architectures")
        return str(named[0]) if isinstance(named, list) and named else default


@dataclass(frozen=True, kw_only=True)
class TensorCuts:
    """Which layers are cut along tensor, by pattern (inside the base model, `*` is one name).

    A column-wise layer is cut by its outputs (heads, neurons), a row-wise one by its inputs, so
    that attention and the feed-forward part need one exchange before and one after (Megatron-LM,
    arXiv 1909.08053). Both empty: as the plan says that transformers ships with the configuration.
    """

    columns: Mapping[str, tuple[Literal["queries", "keys", "inner"], ...]] = field(
        default_factory=dict
    )
    """With what a fused one holds one after the other; each piece is cut by itself."""
    rows: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    """Layers beside those that every rank has: what it sees of the others gives it a part of their
    gradient."""
    per_rank: tuple[str, ...] = ()
    """Counts that a module's forward reads from attributes instead of from its weights, and that
    are divided by the degree where a module has the first; `config.` ones in a copy of it."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One entry. Paths are inside the base model; None: found by looking at its modules."""

    sizes: Callable[[ConfigReader], ModelFacts] | None = None
    """Reads the parameters of a block, of the embedding and of the head; None: no plan."""
    axes: frozenset[str] = WHOLE_BLOCKS
    """Axes that a model can be cut along."""
    tensor: TensorCuts | None = None
    """None: refused along tensor, also where `axes` allows it one day."""
    size_keys: SizeKeys = SizeKeys()
    blocks: str | None = None
    more_blocks: tuple[str, ...] = ()
    """Further lists of blocks (T5's decoder)."""
    norm: str | None = None
    """The norm after the blocks."""
    head: str | None = None
    """Path from the model."""
    logits: tuple[Literal["divide", "multiply", "cap"], str] | None = None
    """What happens to the head's output, and the configuration key of its number."""
    hidden: Literal["first_token_of_image", "detection_tokens_of_image"] | None = None
    """The function of models/families/hidden.py that runs a base model which is not one call on a
    row of tokens."""
