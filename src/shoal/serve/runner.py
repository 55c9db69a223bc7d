"""One forward of many sequences: the model's own modules on one row of all their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from shoal.errors import ModelError
from shoal.models.anatomy import hidden_of, logits_of
from shoal.models.kernels import MaskRequest
from shoal.serve.adapters import Adapters
from shoal.serve.cache import Cache, Paged, Rows, Span, least_rows
from shoal.serve.exact import Report, Sums, Ways, check_positions, make_exact, rows_multiple
from shoal.serve.fuse import fuse_attention, fuse_gates, fuse_layers, fuse_norms
from shoal.serve.pages import hold_in_large_pages
from shoal.serve.part import Part
from shoal.serve.reading import read_model

_MANY_BYTES = 256 << 20
"""Of weights, from which on large pages are worth the time."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Sizes:
    """What of a model the engine must know."""

    vocabulary: int
    context: int
    """Most tokens of a sequence."""
    layers: int
    token_bytes: int
    """Of the cache, for one token in all layers."""
    window: int | None
    """Tokens that every layer looks back at most; None: some look at all."""


class Runner:
    """A model, its cache, and the step."""

    def __init__(
        self,
        model: nn.Module,
        *,
        num_blocks: int,
        block_tokens: int = 64,
        exact: bool = True,
        release: bool = False,
        int8: bool = False,
        adapters: Mapping[str, str] | None = None,
        part: Part | None = None,
        ways: Ways | None = None,
        large_pages: bool = True,
    ) -> None:
        """`exact`: swap the products (serve/exact.py); `int8`: for those of 8 bits.

        `adapters`: folders by name. `part`: which part to hold of `model`; None: all of it.
        `ways`: those of products that are known (serve/exact.py). `large_pages`: for many bytes
        that are served for long (serve/pages.py).
        Raises ModelError if it cannot be served, and UserError where torch has no products of 8
        bits.
        """
        if getattr(model, "shoal_own_attention", False):
            raise ModelError(
                f"{type(model).__name__}: its attention is code of its own, which knows no cache "
                "of blocks\n    serve a family of docs/guide/models.md that takes kernels"
            )
        self.model, self.part = model, part or Part()
        if adapters and self.part.pieces > 1:
            raise ModelError("adapters are served whole: leave serve.tensor and serve.pieces at 1")
        if not self.part.is_cut:
            self.part.cut(model)
        self._keys = _shapes_of_attention(model)
        key_heads, size, value_size = self._keys
        config: Any = model.config
        text = config.get_text_config()
        weight = next(model.parameters())
        dtype, self.device = weight.dtype, weight.device
        context = getattr(text, "max_position_embeddings", None) or 1 << 30
        self.sizes = Sizes(
            vocabulary=text.vocab_size,
            context=min(context, check_positions(config) or context),
            layers=text.num_hidden_layers,
            token_bytes=text.num_hidden_layers * key_heads * (size + value_size) * dtype.itemsize,
            window=_window_of(text),
        )
        self.report: Report | None = None
        exact = exact or int8
        if exact:
            sums = Sums(self.part.sums, self.part.own_pieces, self.part.all_of)
            self.report = make_exact(model, release=release, int8=int8, sums=sums, ways=ways)
            if self.part.pieces > 1:
                kept = self.part.keeps_columns(self.report)
                self.report = replace(self.report, keeps_columns=kept)
            fuse_norms(model)
        self.adapters = Adapters(model, adapters or {})
        self.multiple = rows_multiple(model) if exact else 1
        self.least, self.attends_exactly = (
            least_rows(size=size, value_size=value_size, block_tokens=block_tokens, like=weight)
            if exact
            else (1, False)
        )
        self.cache = Cache(num_blocks, block_tokens)
        if self.report is not None and not adapters:
            fuse_gates(model, self.report.joined)
            kernel = partial(Rows, least=self.least)
            fuse_attention(model, self.report.joined, kernel=kernel)
            fuse_layers(model, kernel=kernel)
        self._logits = logits_of(model)
        cap = getattr(text, "final_logit_softcapping", None)
        lanes = 32 * torch.get_num_threads() if weight.is_cpu else 1
        entries = -(-text.vocab_size // (self.part.degree if self.part.head_is_cut else 1))
        self._head_multiple = lanes if exact and cap and entries % lanes else 1
        if large_pages and weight.is_cpu and bytes_in(model) >= _MANY_BYTES:
            hold_in_large_pages()

    @property
    def exact(self) -> bool:
        """Whether the probes saw no bit of a row depend on the others."""
        return self.report is not None and self.report.proven and self.attends_exactly

    @torch.inference_mode()
    def hidden(
        self,
        tokens: Sequence[int],
        spans: Sequence[Span],
        wanted: Sequence[int],
        *,
        adapters: Sequence[str | None],
    ) -> Tensor:
        """Hidden states [N, D] of the `wanted` columns of a step of `tokens`, laid out as spans.

        `adapters`: the name of each span's; None: none.
        """
        count = len(tokens) + -len(tokens) % self.multiple
        with made_on(self.device):
            self.adapters.lay_out(adapters, spans)
            kernel = Paged(self.cache, spans, num_tokens=count, least=self.least)
            ids = torch.zeros(1, count, dtype=torch.long)
            positions = torch.zeros(1, count, dtype=torch.long)
            ids[0, : len(tokens)] = torch.tensor(tokens)
            places = [at for span in spans for at in range(span.start, span.start + span.count)]
            positions[0, : len(tokens)] = torch.tensor(places)
            batch = {"input_ids": ids, "position_ids": positions}
            return hidden_of(self.model, batch, kernel=kernel)[0, list(wanted)]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [N, V] of hidden states [N, D]."""
        missing = -len(hidden) % self._head_multiple
        rows = functional.pad(hidden, (0, 0, 0, missing)) if missing else hidden
        made: Tensor = self._logits(rows)[: len(hidden)]
        return made.float()


def bytes_in(model: nn.Module) -> int:
    """Of its parameters."""
    return sum(each.numel() * each.element_size() for each in model.parameters())


def log_probabilities(logits: Tensor) -> Tensor:
    """Natural logarithms of probabilities from logits float32 [N, V], to the bit as the loss has.

    log sum exp(x) = max x - log p(max), as in tasks/losses.py: the largest cannot underflow.
    """
    highest, best = logits.max(dim=-1)
    probabilities = functional.softmax(logits, dim=-1, dtype=torch.float32)
    normaliser = highest - probabilities.gather(-1, best[:, None])[:, 0].log()
    return logits - normaliser[:, None]


def made_on(device: torch.device) -> AbstractContextManager[Any]:
    """Within it tensors are made on `device` unless something else is said."""
    return nullcontext() if device.type == "cpu" else device


def load(
    folder: Path, *, precision: str = "float32", device: torch.device | None = None
) -> nn.Module:
    """The causal model of a folder with shoal's attention, on `device` (CPU). Raises ModelError."""
    model: nn.Module = read_model(folder, auto_class="AutoModelForCausalLM", kernel="shoal")
    model.config.use_cache = False  # type: ignore[union-attr]
    return model.to(device or torch.device("cpu"), _DTYPES[precision])


def _window_of(config: Any) -> int | None:
    """The sliding window of a model, where all of its layers have it."""
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return window if set(kinds) == {"sliding_attention"} else None


class _Seen(Exception):
    """Ends the forward that shows the shapes."""


class _Looking:
    """A kernel that only looks at what it is given."""

    by_layer = True
    shapes: tuple[int, int, int] | None = None

    def mask(self, request: MaskRequest) -> None:
        return None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        self.shapes = (key.shape[1], key.shape[-1], value.shape[-1])
        raise _Seen


@torch.no_grad()
def _shapes_of_attention(model: nn.Module) -> tuple[int, int, int]:
    """(key heads, size of a key, size of a value), as a layer of the model has them."""
    looking = _Looking()
    try:
        with made_on(next(model.parameters()).device):
            tokens = torch.zeros(1, 2, dtype=torch.long)
            batch = {"input_ids": tokens, "position_ids": torch.arange(2)[None]}
            hidden_of(model, batch, kernel=looking)
    except _Seen:
        pass
    if looking.shapes is None:
        raise ModelError(f"{type(model).__name__}: it has no attention that shoal could serve")
    return looking.shapes
