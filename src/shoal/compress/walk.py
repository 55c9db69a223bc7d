"""Samples on their way through a model's blocks, one block at a time, with what its layers see.

A block is compressed on the inputs that the blocks before it, already compressed, give. Shapes: N
samples, T tokens, D hidden size, O outputs and I inputs of a layer.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shoal.compress.workers import Workers
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
    sizes: Tensor
    """float64 [I]: sum of absolute values of each."""
    hessian: Tensor | None = None
    """float64 [I, I]: sum of x x'."""
    count: int = 0
    """Input vectors."""

    @classmethod
    def of(cls, rows: Tensor, *, hessian: bool) -> Seen:
        """Of the inputs of one batch, float [n, I]."""
        product = (rows.t() @ rows).double() if hessian else None
        squares, sizes = rows.square().sum(0).double(), rows.abs().sum(0).double()
        return cls(squares, sizes, product, len(rows))

    def plus(self, more: Seen) -> Seen:
        """The sum of both; batches are added one after the other, in their order."""
        product = None
        if self.hessian is not None and more.hessian is not None:
            product = self.hessian + more.hessian
        count = self.count + more.count
        return Seen(self.squares + more.squares, self.sizes + more.sizes, product, count)


@dataclass
class Walk:
    """`hidden`: what goes into the next block, for each batch [n, T, D]."""

    blocks: dict[str, nn.Module]
    hidden: list[Tensor]
    arguments: dict[str, dict[str, Any]]
    """Of each block besides hidden states: masks, positions."""
    workers: Workers
    passed: list[str] = field(default_factory=list)

    @classmethod
    @torch.no_grad()
    def begin(
        cls, model: nn.Module, anatomy: Anatomy, batches: Sequence[Tensor], workers: Workers
    ) -> Walk:
        """`batches`: token ids [n, T], all of one shape, without padding. Raises ModelError."""
        refuse_others(anatomy)
        parent = model.get_submodule(anatomy.blocks)
        blocks = {f"{anatomy.blocks}.{name}": each for name, each in parent.named_children()}
        walk = cls(blocks, [], {}, workers)
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

    def through(self, name: str) -> list[Tensor]:
        """What comes out of a block for what goes in now."""
        return self.workers.map(lambda hidden: self.run(name, hidden), self.hidden)

    def run(self, name: str, hidden: Tensor) -> Tensor:
        """What a block makes of one batch [n, T, D]."""
        rest = self.arguments[name]
        made = self.blocks[name](hidden, *rest["given"], **rest["named"])
        found: Tensor = made[0] if isinstance(made, tuple) else made
        return found

    @torch.no_grad()
    def run_one(self, name: str, sample: Tensor) -> Tensor:
        """What a block makes of one sample [1, T, D]."""
        size = len(self.hidden[0])
        return self.run(name, sample.expand(size, -1, -1))[:1]

    def step(self, name: str) -> None:
        """What came out of a block goes into the next."""
        self.hidden = self.through(name)
        self.passed.append(name)

    def watch(self, name: str, *, hessian: bool) -> dict[str, Seen]:
        """What the matrices of a block see, by their paths in the model."""
        inputs = Inputs(self.blocks[name], inside=name)
        seen: dict[str, Seen] = {}

        def one(hidden: Tensor) -> dict[str, Seen]:
            given = inputs.of(lambda: self.run(name, hidden))
            shared = {  # layers that are given one tensor share what it adds up to
                id(each): Seen.of(each.flatten(0, -2).float(), hessian=hessian)
                for each in {id(each): each for each in given.values()}.values()
            }
            return {path: shared[id(each)] for path, each in given.items()}

        def take(found: dict[str, Seen]) -> None:
            for path, each in found.items():
                seen[path] = seen[path].plus(each) if path in seen else each

        with inputs.hooked():
            self.workers.ordered(one, self.hidden, take)
        return {path: seen[path] for path in matrices_of(self.blocks[name], inside=name)}


class _Enough(Exception):
    """The first block has what it needs."""


class Inputs:
    """What matrices are given in a forward, whichever thread runs it."""

    def __init__(self, module: nn.Module, *, inside: str) -> None:
        """`inside`: the path of `module` in the model."""
        self._layers = linear_layers(module, inside=inside)
        self._experts = list(experts_of(module).values())
        self._expert_paths = {
            each.data_ptr(): path for path, each in expert_matrices(module, inside=inside).items()
        }
        self._here = threading.local()

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """While it is open, forwards are heard."""
        handles = [
            layer.register_forward_pre_hook(self._hook(path))
            for path, layer in self._layers.items()
        ]
        for each in self._experts:
            each.shoal_linear = self._product  # type: ignore[assignment]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for each in self._experts:
                del each.shoal_linear

    def _product(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """An expert's, whose rows are noted."""
        self._here.given[self._expert_paths[weight.data_ptr()]] = rows
        return torch.nn.functional.linear(rows, weight, bias)

    def of(self, forward: Callable[[], object]) -> dict[str, Tensor]:
        """Of each layer in this forward [..., I]: one tensor where layers share it."""
        self._here.given = {}
        forward()
        given: dict[str, Tensor] = self._here.given
        del self._here.given
        return given

    def _hook(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            self._here.given[path] = given[0]

        return hook


def refuse_others(anatomy: Anatomy) -> None:
    """Raise ModelError for what is not a decoder."""
    if anatomy.more_blocks:
        raise ModelError(
            f"{anatomy.family}: an encoder and a decoder are not compressed yet\n"
            "    give a decoder-only language model"
        )


def linear_layers(module: nn.Module, *, inside: str) -> dict[str, nn.Module]:
    """The linear layers of a part of the model, by path."""
    return {
        f"{inside}.{path}": each
        for path, each in module.named_modules()
        if type(each) is nn.Linear or is_transposed(each)
    }


def expert_matrices(module: nn.Module, *, inside: str) -> dict[str, Tensor]:
    """The weights [O, I] of the experts of a part of the model, as views, by path and number."""
    found = {}
    for path, each in experts_of(module).items():
        made: Any = each
        for layer in ("gate_up_proj" if made.has_gate else "up_proj", "down_proj"):
            stacked = getattr(made, layer).detach()
            if made.is_transposed:
                stacked = stacked.transpose(1, 2)
            for number, matrix in enumerate(stacked.unbind(0)):
                found[f"{inside}.{path}.{layer}.{number}"] = matrix
    return found


def matrices_of(module: nn.Module, *, inside: str) -> dict[str, Tensor]:
    """All that is compressed of a part of the model, as views [O, I], by path."""
    layers = linear_layers(module, inside=inside)
    plain = {path: matrix_of(layer).detach() for path, layer in layers.items()}
    return plain | expert_matrices(module, inside=inside)


def influence(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """1 - mean cosine of what goes into a block and what comes out (ShortGPT, arXiv 2403.03853)."""
    cosines = [
        torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).flatten()
        for a, b in zip(before, after, strict=True)
    ]
    return 1.0 - float(torch.cat(cosines).mean())
