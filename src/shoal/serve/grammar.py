"""JSON schemas as masks over tokens, by xgrammar: an answer cannot leave its schema."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.errors import UserError

_MOST_KEPT = 64
"""Compiled schemas."""


class Grammars:
    """Compiles schemas for one tokenizer."""

    def __init__(self, folder: Path, *, vocabulary: int, ends: Sequence[int]) -> None:
        """`vocabulary`: entries of the logits; `ends`: tokens that may end an answer."""
        import xgrammar
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        about = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocabulary, stop_token_ids=list(ends)
        )
        self._xgrammar, self._vocabulary, self._ends = xgrammar, vocabulary, bool(ends)
        self._compiler = xgrammar.GrammarCompiler(about, max_threads=1)
        self._kept: OrderedDict[str, Any] = OrderedDict()

    def compile(self, schema: str) -> Any:
        """The grammar of a JSON schema; of an empty one any JSON. Raises UserError."""
        found = self._kept.get(schema)
        if found is None:
            try:
                if schema:
                    found = self._compiler.compile_json_schema(schema)
                else:
                    found = self._compiler.compile_builtin_json_grammar()
            except Exception as error:  # its own kinds of error, by what is wrong
                reason = str(error).strip().splitlines()[-1][:200] if str(error).strip() else ""
                raise UserError(f"the schema cannot be followed: {reason}") from None
            self._kept[schema] = found
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
        return found

    def follow(self, schema: str, *, so_far: Sequence[int] = ()) -> Following:
        """A new answer under a schema, of which there is `so_far` already. Raises UserError."""
        matcher = self._xgrammar.GrammarMatcher(
            self.compile(schema), terminate_without_stop_token=not self._ends
        )
        following = Following(matcher, vocabulary=self._vocabulary)
        for token in so_far:
            following.accept(token)
        return following


class Following:
    """One answer on its way through a grammar."""

    def __init__(self, matcher: Any, *, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._mask = np.zeros((1, -(-vocabulary // 32)), dtype=np.int32)

    @property
    def ended(self) -> bool:
        """Whether nothing more may come."""
        return bool(self._matcher.is_terminated())

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next [V]."""
        self._mask[:] = -1
        self._matcher.fill_next_token_bitmask(self._mask)
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")
        return bits[: self._vocabulary].astype(np.bool_)

    def accept(self, token: int) -> None:
        """The next token."""
        if not self.ended:
            self._matcher.accept_token(token)
