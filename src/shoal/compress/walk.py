"""Samples on their way through a model's blocks, one block at a time, with what its layers see.

A block is compressed on the inputs that the blocks before it, already compressed, give. Shapes: N
samples, T tokens, D hidden size, O outputs and I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import ModelError
from shoal.models.adapter import matrix_of
from shoal.models.anatomy import Anatomy
from shoal.models.experts import experts_of
from shoal.models.placement import is_transposed


@dataclass
class Seen:
    """What the inputs of a layer add up to."""

    squares: Tensor
    """float64 [I]: sum of squares of each."""
    hessian: Tensor | None = None
    """float64 [I, I]: sum of x x'."""
    count: int = 0
    """Input vectors."""

    @classmethod
    def of(cls, inputs: int, *, hessian: bool) -> Seen:
        """Nothing yet."""
        square = torch.zeros(inputs, inputs, dtype=torch.float64) if hessian else None
        return cls(torch.zeros(inputs, dtype=torch.float64), square)

    def add(self, rows: Tensor) -> None:
        """More inputs, float [n, I]."""
        self.count += len(rows)
        self.squares += rows.square().sum(0).double()
        if self.hessian is not None:
            self.hessian += (rows.t() @ rows).double()


@dataclass
class Walk:
    """`hidden`: what goes into the next block, for each batch [n, T, D]."""

    blocks: dict[str, nn.Module]
    hidden: list[Tensor]
    arguments: dict[str, dict[str, Any]]
    """Of each block besides hidden states: masks, positions."""
    passed: list[str] = field(default_factory=list)

    @classmethod
    @torch.no_grad()
    def begin(cls, model: nn.Module, anatomy: Anatomy, batches: Sequence[Tensor]) -> Walk:
        """`batches`: token ids [n, T], all of one shape, without padding. Raises ModelError."""
        if anatomy.more_blocks:
            raise ModelError(
                f"{anatomy.family}: an encoder and a decoder are not compressed yet\n"
                "    give a decoder-only language model"
            )
        if experts_of(model):
            raise ModelError(
                f"{anatomy.family}: mixtures of experts are not compressed yet\n"
                "    give a dense language model"
            )
        parent = model.get_submodule(anatomy.blocks)
        blocks = {f"{anatomy.blocks}.{name}": each for name, each in parent.named_children()}
        walk = cls(blocks, [], {})
        handles = [
            block.register_forward_pre_hook(walk._note(name), with_kwargs=True)
            for name, block in blocks.items()
        ]
        first = next(iter(blocks))
        try:
            for number, ids in enumerate(batches):
                try:
                    model(input_ids=ids, use_cache=False)
                except _Enough:
                    continue
                assert number == 0, f"{first} stops all batches but the first"
        finally:
            for handle in handles:
                handle.remove()
        return walk

    def _note(self, name: str) -> Callable[..., None]:
        first = next(iter(self.blocks))

        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            if name == first:
                self.hidden.append(given[0] if given else named["hidden_states"])
            if name in self.arguments:
                raise _Enough
            rest = {key: value for key, value in named.items() if key != "hidden_states"}
            self.arguments[name] = {"given": given[1:], "named": rest}

        return hook

    @torch.no_grad()
    def through(self, name: str) -> list[Tensor]:
        """What comes out of a block for what goes in now."""
        block, rest = self.blocks[name], self.arguments[name]
        found = []
        for hidden in self.hidden:
            made = block(hidden, *rest["given"], **rest["named"])
            found.append(made[0] if isinstance(made, tuple) else made)
        return found

    def step(self, name: str) -> None:
        """What came out of a block goes into the next."""
        self.hidden = self.through(name)
        self.passed.append(name)

    def watch(self, name: str, *, hessian: bool) -> dict[str, Seen]:
        """What the linear layers of a block see, by their paths in the model."""
        layers = linear_layers(self.blocks[name], inside=name)
        seen = {
            path: Seen.of(matrix_of(layer).shape[1], hessian=hessian)
            for path, layer in layers.items()
        }
        handles = [
            layer.register_forward_pre_hook(_adder(seen[path])) for path, layer in layers.items()
        ]
        try:
            self.through(name)
        finally:
            for handle in handles:
                handle.remove()
        return seen


class _Enough(Exception):
    """The first block has what it needs."""


def _adder(seen: Seen) -> Callable[..., None]:
    def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        seen.add(given[0].detach().flatten(0, -2).float())

    return hook


def linear_layers(module: nn.Module, *, inside: str) -> dict[str, nn.Module]:
    """The linear layers of a part of the model, by path."""
    return {
        f"{inside}.{path}": each
        for path, each in module.named_modules()
        if type(each) is nn.Linear or is_transposed(each)
    }


def influence(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """1 - mean cosine of what goes into a block and what comes out (ShortGPT, arXiv 2403.03853)."""
    cosines = [
        torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).flatten()
        for a, b in zip(before, after, strict=True)
    ]
    return 1.0 - float(torch.cat(cosines).mean())
