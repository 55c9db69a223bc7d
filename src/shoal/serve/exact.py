"""Matrix products whose rows do not depend on how many rows there are: probed, then swapped in.

A library picks its kernel by the shape of a product, so a row has other last bits alone than among
others, and an answer would depend on who is computed beside it. Here each weight gets a way of
computing in which that was seen not to happen on this machine: a product packed by oneDNN, or
torch's own, its rows padded to a multiple where small numbers of rows differ.

Shapes: R rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shoal.errors import ModelError, UserError
from shoal.models.experts import experts_of
from shoal.serve.int8 import Int8Product, cannot_multiply, is_exact
from shoal.serve.rows import MOST_ROWS, Way, in_pieces, keeps_rows, probe_rows

_ROWS = (*range(1, 10), 12, 13, 16, 17, 31, 32, 33, 48, 64, 100, 128, 200, 256, MOST_ROWS)
_FEW_ROWS = (1, 2, 3, 5, 8, 16, 33, 64)
_LARGE = 8 << 20
"""Elements of a weight beyond which fewer numbers of rows are tried."""
_MULTIPLES = (1, 2, 4, 8, 16, 32)
_WIDE = 1024
"""Inputs beyond which oneDNN computes a single row in another order than several (seen with torch
2.13): such a product is made of parts."""
_HINT = 16
"""Rows that oneDNN is told to expect: with 1 it packs for another kernel."""
LANES = 32
"""Floats that torch's vectorised loops take at once; what is left over is computed by other code,
whose silu, sigmoid, gelu (tanh) and softplus differ in the last bit (seen with torch 2.13)."""
_SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of a module that read the same rows: one product. Of each the outputs are a multiple of
the lanes, so that no loop over a part of a row leaves anything over."""


Ways = dict[tuple[int, int], Way]
"""One way for each shape of weight, (O, I)."""


@dataclass(frozen=True)
class Report:
    """What the probe found: one way for each shape of weight, (O, I)."""

    ways: Ways
    dtype: torch.dtype
    threads: int
    joined: dict[str, Together]
    """Products that stand for several layers, by the path of their module."""
    num_int8: int = 0
    """Products whose weights are whole numbers of 8 bits."""
    keeps_columns: bool = True
    """Whether outputs have the same bits beside fewer others, on a rank of the tensor axis."""

    @property
    def proven(self) -> bool:
        """Whether every product gives a row the same bits in any company."""
        return self.keeps_columns and all(way.proven for way in self.ways.values())

    def __str__(self) -> str:
        packed = sum(way.packed for way in self.ways.values())
        padded = sum(way.multiple > 1 for way in self.ways.values())
        failed = [f"{o} x {i}" for (o, i), way in self.ways.items() if not way.proven]
        kind = str(self.dtype).removeprefix("torch.")
        text = (
            f"exact products in {kind}, {self.threads} thread{'s'[: self.threads > 1]}: "
            f"{len(self.ways)} shapes of weight, {packed} packed by oneDNN, {padded} with padded "
            "rows"
        )
        if self.num_int8:
            text += f"; {self.num_int8} products of int8 weights and rows, the head's is whole"
        if not self.keeps_columns:
            text += "; not exact: layers in parts have other bits than whole ones"
        return text + (f"; not exact: {', '.join(failed)}" if failed else "")


class Product(nn.Module):
    """What stands in for a linear layer's forward: rows [..., I] -> [..., O]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, way: Way) -> None:
        super().__init__()
        self.way, self._bias, self._outputs = way, bias, len(weight)
        parts = weight.chunk(way.pieces, dim=1)
        self._weights = [_packed(each) for each in parts] if way.packed else parts

    def forward(self, rows: Tensor) -> Tensor:
        """Each row's product, the same bits whatever the other rows are."""
        return in_pieces(rows, self._piece, outputs=self._outputs)

    def _piece(self, rows: Tensor) -> Tensor:
        count = len(rows)
        missing = -count % self.way.multiple
        if missing:
            rows = functional.pad(rows, (0, 0, 0, missing))
        pieces = len(self._weights)
        made = self.of_parts((rows,) if pieces == 1 else rows.chunk(pieces, dim=1))
        return made[:count] if missing else made

    def of_parts(self, parts: Sequence[Tensor]) -> Tensor:
        """The product of rows that are given by parts of their inputs, one for each piece."""
        made = self._product(parts[0], self._weights[0], self._bias)
        for part, weight in zip(parts[1:], self._weights[1:], strict=True):
            made = made + self._product(part, weight, None)
        return made

    def _product(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.way.packed:
            return functional.linear(rows, weight, bias)
        # private in torch 2.13: the product that Inductor uses for weights packed beforehand
        made: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows.contiguous(), weight, bias, "none", [], ""
        )
        return made


AnyProduct = Product | Int8Product


def _packed(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _HINT)
    return packed


def can_pack() -> bool:
    """Whether this build of torch has the packed products."""
    found = hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return bool(found and torch.backends.mkldnn.is_available())


@torch.no_grad()
def way_for(weight: Tensor, bias: Tensor | None = None) -> Way:
    """The first way in which rows of products with `weight` [O, I] keep their bits.

    Alone and in batches of up to `MOST_ROWS`, at any place among them, with one thread and with as
    many as this process has. Not `proven` where none does: then torch's own product is used.
    """
    counts = _FEW_ROWS if weight.numel() > _LARGE else _ROWS
    rows = probe_rows(weight.shape[1], count=max(counts), like=weight)
    for packed in (True, False):
        if packed and not (weight.is_cpu and can_pack()):
            continue
        for pieces in _pieces(weight.shape[1], packed):
            for multiple in _MULTIPLES if pieces == 1 else (1,):
                way = Way(packed, multiple, pieces=pieces)
                if keeps_rows(Product(weight, bias, way), rows, counts):
                    return way
    return Way(False, 1, proven=False)


@torch.no_grad()
def keeps_columns(widths: Collection[int], *, inputs: int, dtype: torch.dtype) -> bool:
    """Whether an output has the same bits in products of any of `widths` outputs."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(max(widths), inputs, generator=generator).to(dtype)
    rows = probe_rows(inputs, count=3, like=weight)

    def product(width: int) -> Tensor:
        own = weight[:width]
        return Product(own, None, way_for(own))(rows)

    *narrower, widest = sorted(widths)
    whole = product(widest)
    return all(torch.equal(product(width), whole[:, :width]) for width in narrower)


def _pieces(inputs: int, packed: bool) -> tuple[int, ...]:
    """Numbers of parts of the inputs to try, the likeliest first."""
    half = -(-inputs // _WIDE)
    return (half, 1) if packed and half > 1 and inputs % half == 0 else (1,)


@dataclass(frozen=True)
class Sums:
    """Layers whose products are parts of sums: `own` pieces each here, `all_of` gets the others'.

    The pieces of all are added in order, then the bias.
    """

    layers: Sequence[nn.Module] = ()
    own: int = 1
    all_of: Callable[[list[Tensor]], list[Tensor]] = list

    def forward(
        self, products: Sequence[AnyProduct], bias: Tensor | None
    ) -> Callable[[Tensor], Tensor]:
        """The forward of a layer with a product for each piece of its inputs."""

        def forward(rows: Tensor) -> Tensor:
            parts = rows.chunk(len(products), dim=-1)
            first, *others = self.all_of([own(part) for own, part in zip(products, parts)])
            for each in others:
                first = first + each
            return first if bias is None else first + bias

        return forward


def make_exact(
    model: nn.Module,
    *,
    release: bool = False,
    int8: bool = False,
    sums: Sums | None = None,
    ways: Ways | None = None,
) -> Report:
    """Swap the products of `model`'s layers, experts too, for exact ones; says which were found.

    `release`: the layers' own weights are given up where a packed copy has them (a layer whose
    weight another module shares, such as a tied embedding, keeps it). Idempotent. `sums`: layers
    that are made of pieces. `ways`: known from a model of the same shapes; what is found is added.
    """
    sums = sums or Sums()
    device = next(model.parameters()).device
    if int8 and (why := cannot_multiply(device)) is not None:
        raise UserError(f"serve.weights: int8 cannot be served here: {why}\n    leave it at full")
    maker = _Maker(int8, {} if ways is None else ways)
    shared = _shared(model)
    joined = _join(model, maker)
    head = _head(model)
    made = {id(layer): each.product for each in joined.values() for layer in each.layers}
    for module, weight, bias in _linears(model):
        product = made.get(id(module))
        if any(module is each for each in sums.layers):
            pieces = [maker.of(each, None) for each in weight.chunk(sums.own, dim=1)]
            module.forward = sums.forward(pieces, bias)  # type: ignore[method-assign]
            product = pieces[0]
        if product is None:
            product = maker.of(weight, bias, head=module is head)
            module.forward = product.forward  # type: ignore[method-assign]
        own: Any = module.weight
        if release and product.way.packed and id(own) not in shared:
            own.data = own.data.new_empty(1).expand(own.shape)
    for module in experts_of(model).values():
        _make_experts_exact(module, maker)
    for weight in _others(model):
        shape = (weight.shape[0], weight.shape[1])
        if shape not in maker.ways:
            maker.ways[shape] = _plain_way(weight)
    dtype = next(model.parameters()).dtype
    return Report(maker.ways, dtype, torch.get_num_threads(), joined, maker.num_int8)


def _head(model: nn.Module) -> nn.Module | None:
    get: Any = getattr(model, "get_output_embeddings", None)
    found: nn.Module | None = None if get is None else get()
    return found


@dataclass
class _Maker:
    """Makes the products of a model, with one probe for each shape of weight."""

    int8: bool
    ways: Ways
    num_int8: int = 0

    def of(self, weight: Tensor, bias: Tensor | None, *, head: bool = False) -> AnyProduct:
        """The product with a weight [O, I]; the head's, and experts', stay whole."""
        if not self.int8 or head:
            return Product(weight, bias, self.way(weight, bias))
        made = Int8Product(weight, bias)
        shape = (weight.shape[0], weight.shape[1])
        if shape not in self.ways:
            exact = is_exact(made, inputs=weight.shape[1])
            self.ways[shape] = Way(packed=True, multiple=1, proven=exact)
        self.num_int8 += 1
        return made

    def way(self, weight: Tensor, bias: Tensor | None = None) -> Way:
        """The way of a whole weight [O, I]."""
        shape = (weight.shape[0], weight.shape[1])
        if shape not in self.ways:
            self.ways[shape] = way_for(weight, bias)
        return self.ways[shape]


class Together:
    """Layers that read the same rows, as one product; each layer's forward gives its part."""

    def __init__(self, layers: Sequence[nn.Linear], maker: _Maker) -> None:
        weight = torch.cat([each.weight.detach() for each in layers])
        biases = [each.bias for each in layers]
        bias = None if biases[0] is None else torch.cat([each.detach() for each in biases])
        self.layers = list(layers)
        self.product = maker.of(weight, bias)
        self._sizes = [each.out_features for each in layers]
        self._given: Tensor | None = None
        self._made: tuple[Tensor, ...] = ()

    def part(self, number: int) -> Callable[[Tensor], Tensor]:
        """The forward of layer `number`: the first that is given new rows computes for all."""

        def forward(rows: Tensor) -> Tensor:
            if self._given is not rows:
                self._made, self._given = self.product(rows).split(self._sizes, dim=-1), rows
            made = self._made[number]
            if number == len(self._sizes) - 1:
                self._given, self._made = None, ()
            return made

        return forward


def _join(model: nn.Module, maker: _Maker) -> dict[str, Together]:
    """Make one product of layers that read the same rows; by the path of their module."""
    made: dict[str, Together] = {}
    for path, module in model.named_modules():
        for names in _SIBLINGS:
            layers: list[Any] = [getattr(module, name, None) for name in names]
            if not all(_is_plain(each) for each in layers):
                continue
            if len({(each.in_features, each.bias is None) for each in layers}) > 1:
                continue
            together = Together(layers, maker)
            for number, layer in enumerate(layers):
                layer.forward = together.part(number)
            made[path] = together
    return made


def _is_plain(layer: Any) -> bool:
    return type(layer) is nn.Linear and layer.out_features % LANES == 0


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor, Tensor | None]]:
    """Layers that are one product, with their weight as [O, I]."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield module, module.weight.detach(), _detached(module.bias)
        elif isinstance(module, Conv1D):  # GPT-2 keeps its weights the other way round
            yield module, module.weight.detach().t().contiguous(), _detached(module.bias)


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def _shared(model: nn.Module) -> set[int]:
    """Parameters that more than one module has."""
    seen: set[int] = set()
    found: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (found if id(parameter) in seen else seen).add(id(parameter))
    return found


def _make_experts_exact(module: Any, maker: _Maker) -> None:
    products: dict[int, Product] = {}
    for layer in ("gate_up_proj", "up_proj", "down_proj"):
        stacked = getattr(module, layer, None)
        if not isinstance(stacked, Tensor):
            continue
        stacked = stacked.detach().transpose(1, 2) if module.is_transposed else stacked.detach()
        for weight in stacked.unbind(0):
            products[weight.data_ptr()] = Product(weight, None, maker.way(weight))

    def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        made: Tensor = products[weight.data_ptr()](rows)
        return made if bias is None else made + bias

    module.shoal_linear = linear


def _others(model: nn.Module) -> Iterator[Tensor]:
    """Weights that a module multiplies with by itself, such as a router's."""
    known = (nn.Linear, Conv1D, nn.Embedding)
    experts = set(map(id, experts_of(model).values()))
    for module in model.modules():
        if isinstance(module, known) or id(module) in experts:
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 2:
                yield parameter.detach()


def _plain_way(weight: Tensor) -> Way:
    """The way of torch's own product: padding is the runner's, of all rows of a step."""
    rows = probe_rows(weight.shape[1], count=MOST_ROWS, like=weight)
    for multiple in _MULTIPLES:
        if keeps_rows(Product(weight, None, Way(False, multiple)), rows, _ROWS):
            return Way(False, multiple)
    return Way(False, 1, proven=False)


def rows_multiple(model: nn.Module) -> int:
    """What the number of a step's tokens is padded to, so that its row-wise operations are exact.

    Torch's vectorised loops end, in each thread, with code for what is left; with this multiple
    nothing is left. Also what products that cannot be swapped need.
    """
    lanes = LANES * torch.get_num_threads()
    multiple = 1
    if next(model.parameters()).is_cpu:
        multiple = max(lanes // gcd(width, lanes) for width in _widths(model))
    for weight in _others(model):
        multiple = max(multiple, _plain_way(weight).multiple)
    return multiple


def _widths(model: nn.Module) -> set[int]:
    """Sizes of the last dim of what flows between layers, the vocabulary's left out."""
    head = _head(model)
    found: set[int] = set()
    for module, weight, _ in _linears(model):
        if module is not head:
            found |= {weight.shape[0], weight.shape[1]}
    for weight in _others(model):
        found |= {weight.shape[0], weight.shape[1]}
    for module in model.modules():
        found |= {each.shape[0] for each in module.parameters(recurse=False) if each.dim() == 1}
        frequencies = module._buffers.get("inv_freq")
        if frequencies is not None:
            found.add(2 * len(frequencies))
    config: Any = model.config
    size = getattr(config.get_text_config(), "head_dim", None)
    return found | ({size} if isinstance(size, int) else set())


def check_positions(config: Any) -> int | None:
    """Most positions at which rotary frequencies do not depend on who else is in a batch.

    Some scalings change with the longest row of a forward; they are served up to the length at
    which they begin. None: no such limit. Raises ModelError where it is not known.
    """
    text = config.get_text_config()
    given = getattr(text, "rope_parameters", None) or {}
    each = given.values() if all(isinstance(v, dict) for v in given.values()) else [given]
    limits = []
    for rope in each:
        kind = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
        if kind in ("dynamic", "longrope"):
            limit = rope.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", text.max_position_embeddings
            )
            if not isinstance(limit, int):
                raise ModelError(
                    f"config.json: rotary positions of kind {kind!r} without the length at which "
                    "they change\n    add original_max_position_embeddings"
                )
            limits.append(limit)
    return min(limits) if limits else None
