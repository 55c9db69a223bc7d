"""Where a model's parts are: embeddings, blocks, final norm, head, ties; hidden states and logits.

The seam between Hugging Face models and everything that cuts or trains them.
Shapes: B rows, T tokens, D hidden size, V vocabulary or labels.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from shoal.errors import ModelError
from shoal.fields import TOKENS, Fields
from shoal.legal import family_of
from shoal.models.families.hidden import HIDDEN
from shoal.models.families.logits import transform_of
from shoal.models.forward_context import Routing, forward_context_of, set_forward_context
from shoal.models.kernels import Kernel, local
from shoal.models.placement import Parts, Placement, placements_of
from shoal.models.routing import Balance, counted_in, routing_of

Logits = Callable[[Tensor], Tensor]

_WRAPPERS = re.compile(r"(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\.")
"""Prefixes that wrappers of torch put into parameter names; canonical names have none."""


@dataclass(frozen=True)
class Anatomy:
    """Dotted paths of the parts of one model, and its canonical parameters.

    `embeddings`: every table looked up before the blocks, tokens first. `more_blocks`: further
    lists of blocks (T5's decoder). `head` is None for a bare base model. `ties`: groups of names of
    one parameter, canonical name first. `whole_logits`:
    head(hidden) is not the model's logits for this class, so `hidden_of` gives the model's own
    logits and `logits_of` changes nothing (right, but never chunked).
    """

    family: str
    base: str
    embeddings: tuple[str, ...]
    blocks: str
    more_blocks: tuple[str, ...]
    num_blocks: int
    norm: str | None
    head: str | None
    after_base: tuple[str, ...]
    parameters: tuple[str, ...]
    ties: tuple[tuple[str, ...], ...]
    placements: Mapping[str, Placement]
    whole_logits: bool = False


def canonical_name(name: str) -> str:
    """A parameter's name without what wrappers (compile, recompute) put into it."""
    return _WRAPPERS.sub("", name)


def canonical_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by canonical name in the model's order; a tied one once, by its first name."""
    return {canonical_name(name): each for name, each in model.named_parameters()}


def ties_of(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of names that are one parameter; the canonical name first in each."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(canonical_name(name))
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def weight_decay_names(model: nn.Module) -> frozenset[str]:
    """Canonical names that weight decay applies to: weights of projections, whatever their dims.

    By the kind of module: norms (a norm of each head has two dims), biases and embeddings are
    spared; an embedding row that a batch lacks would decay without a gradient to answer. A head
    tied to the embedding is an embedding.
    """
    spared = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()
        for parameter in module.parameters(recurse=False)
    }
    return frozenset(
        name
        for name, parameter in canonical_parameters(model).items()
        if parameter.dim() >= 2
        and id(parameter) not in spared
        and not name.rpartition(".")[2].endswith("bias")
    )


def anatomy_of(model: nn.Module) -> Anatomy:
    """Read the anatomy off a transformers model (meta or real).

    Raises ModelError when the base model or its list of blocks cannot be found.
    """
    config: Any = model.config
    family = family_of(config.model_type)
    base_path = str(getattr(model, "base_model_prefix", ""))
    base = getattr(model, base_path, None) if base_path else None
    if base is None:
        base_path, base = "", model
    blocks = _blocks_path(base, family.blocks, model)
    dotted = f"{base_path}." if base_path else ""
    more = _more_blocks(base, blocks) if config.is_encoder_decoder else ()
    lists = (dotted + blocks, *(dotted + each for each in more))
    parts = Parts(
        base=base_path,
        blocks=lists[0],
        norm=_norm_path(base, family.norm, blocks, config, dotted),
        head=_head_path(model, base_path),
        ties=ties_of(model),
    )
    return Anatomy(
        family=config.model_type,
        base=base_path,
        embeddings=tuple(_embedding_paths(model, dotted + blocks)),
        blocks=parts.blocks,
        more_blocks=lists[1:],
        num_blocks=sum(len(list(model.get_submodule(each).children())) for each in lists),
        norm=parts.norm,
        head=parts.head,
        after_base=tuple(_dropouts_after(model, base_path)),
        parameters=tuple(canonical_parameters(model)),
        ties=tuple(tuple(group) for group in parts.ties),
        placements=placements_of(model, parts),
    )


def hidden_of(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    step: int = 0,
    fields: Fields = TOKENS,
    kernel: Kernel | None = None,
    routing: Routing | None = None,
) -> Tensor:
    """Hidden states [B, T, D] of a batch, without the head.

    `batch`: input_ids int64 [B, T]; position_ids int64 [B, T] (a document's first token has 0),
    document_ids int32 [B, T], sample_ids int64 [B] where the model uses them; for images
    pixel_values, for encoder-decoders decoder_input_ids. `step` keys the dropout. `fields`
    describe what runs along the sequence `tokens`, and how it is padded. `kernel` says how the
    tokens attend to one another; None: as the context around this forward has it. `routing` is
    filled with what routers of experts decide.
    """
    family = family_of(_config(model).model_type)
    multiple = int(getattr(model, "shoal_sequence_multiple", 1))
    num_tokens = batch["input_ids"].shape[1] if "input_ids" in batch else 0
    if num_tokens % multiple:
        batch = padded(batch, fields, more=-num_tokens % multiple)
    routing = routing or routing_of(model, len(next(iter(batch.values()))))
    context = forward_context_of(batch, step=step, kernel=kernel, routing=routing)
    if context.kernel is not local and getattr(model, "shoal_own_attention", False):
        raise ModelError(
            f"{type(model).__name__}: its own attention sees this forward's tokens "
            "alone\n    set parallel.context to 1"
        )
    with set_forward_context(context), counted_in(model, routing):
        inputs = _inputs(model, batch)
        if getattr(model, "shoal_whole_logits", False):
            return logits_in(model(**inputs, use_cache=False))
        named = "hidden_of_decoder" if _is_two_halves(model) else family.hidden
        if named is not None:
            return HIDDEN[named](model, {**batch, **inputs})
        base = _called(model)
        hidden: Tensor = base(**inputs, use_cache=False).last_hidden_state
        for path in _dropouts_after(model, str(getattr(model, "base_model_prefix", ""))):
            hidden = model.get_submodule(path)(hidden)
    return hidden[:, :num_tokens] if num_tokens % multiple else hidden


def balanced_hidden_of(
    model: nn.Module, batch: dict[str, Tensor], *, targets: Tensor | None, step: int = 0
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`hidden_of` a batch, and the term of the model's balance loss of experts, if it has one.

    `targets` [B]: of each row, by which its term is weighted in a sum of losses; None: no term.
    """
    balance: Balance | None = getattr(model, "shoal_balance", None)
    routing = routing_of(model, len(batch["input_ids"]))
    hidden = hidden_of(model, batch, step=step, routing=routing)
    if balance is None or routing is None or targets is None:
        return hidden, ()
    return hidden, (balance.term(routing, targets),)


def _inputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch the base model's own forward takes."""
    base = _called(model)
    known = _arguments(type(base).forward)
    inputs = {name: batch[name] for name in known if name in batch}
    if "position_ids" in inputs:
        if not hasattr(model, "shoal_first_position"):
            model.shoal_first_position = _first_position(base)  # type: ignore[assignment]
        first: Any = model.shoal_first_position
        inputs["position_ids"] = inputs["position_ids"] + first if first else inputs["position_ids"]
    if getattr(model, "shoal_own_attention", False) and "document_ids" in batch:
        inputs.setdefault("attention_mask", (batch["document_ids"] >= 0).long())
    return inputs


def _called(model: nn.Module) -> nn.Module:
    """The base model; a decoder that transformers wraps for names alone (BART's) is what is in."""
    base: nn.Module = getattr(model, str(getattr(model, "base_model_prefix", "")), model)
    inner = getattr(base, "decoder", None)
    if inner is not None and not {"input_ids", "input_features"} & {
        *_arguments(type(base).forward)
    }:
        return inner  # type: ignore[no-any-return]
    return base


def _is_two_halves(model: nn.Module) -> bool:
    """Whether an encoder and a decoder hang on the model itself, without a base model (T5)."""
    base = str(getattr(model, "base_model_prefix", ""))
    return not hasattr(model, base) and all(hasattr(model, half) for half in ("encoder", "decoder"))


def _first_position(base: nn.Module) -> int:
    """The position of a first token: a table with a row for padding counts on from it (fairseq)."""
    for module in base.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table.padding_idx + 1
    return 0


@functools.cache
def _arguments(forward: Callable[..., Any]) -> tuple[str, ...]:
    # losses are the tasks': a base model that is the whole one must not make another
    return tuple(name for name in inspect.signature(forward).parameters if name != "labels")


def padded(batch: dict[str, Tensor], fields: Fields, *, more: int) -> dict[str, Tensor]:
    """Rows of `more` tokens more: ranks that split the sequence need equal parts.

    What is added is padding (document -1), which no token of a document sees.
    """
    documents = torch.zeros_like(batch["input_ids"], dtype=torch.int32)
    padded = {"document_ids": documents, **batch}
    for name, field in fields.items():
        if field.sequence == "tokens" and name in padded:
            padded[name] = functional.pad(padded[name], (0, more), value=field.fill)
    return padded


def logits_of(model: nn.Module) -> Logits:
    """What turns hidden states [..., D] into logits [..., V]: the head and the family's transform.

    A bare base model (AutoModel) has no head: its states are what it gives. Raises ModelError for
    a model around one that has none either.
    """
    base = str(getattr(model, "base_model_prefix", ""))
    path = _head_path(model, base)
    bare = path is None and not hasattr(model, base)
    if bare or getattr(model, "shoal_whole_logits", False):
        return lambda hidden: hidden
    if path is None:
        raise ModelError(
            f"{type(model).__name__}: it has no head, so it gives no logits\n"
            "    build it for a task (model.kind config or pretrained with task.kind)"
        )
    head = model.get_submodule(path)
    transform = transform_of(model.config)
    if transform is None:
        return head
    return lambda hidden: transform(head(hidden))


def logits_in(output: Any) -> Tensor:
    """The logits of what a model of transformers gives; of the ends of answers both [B, T, 2].

    Of a bare base model the states of its last layer.
    """
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    logits: Tensor = output["logits" if "logits" in output else "last_hidden_state"]
    return logits


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that `logits_of` uses, a tied embedding among them; chunked loss wants them."""
    if getattr(model, "shoal_whole_logits", False):
        return []
    path = _head_path(model, str(getattr(model, "base_model_prefix", "")))
    return [] if path is None else list(model.get_submodule(path).parameters())


@torch.no_grad()
def check_logits(model: nn.Module, anatomy: Anatomy, *, num_tokens: int = 8) -> Anatomy:
    """Check on a few tokens that logits_of(hidden_of) is the model's own logits; real models only.

    A class that fails uses its own logits from then on: a warning says so, the model carries the
    mark `shoal_whole_logits`, and the anatomy that is returned has `whole_logits` set.
    """
    if anatomy.head is None:
        return anatomy
    batch = example_of(model, num_tokens=num_tokens)
    inputs = _inputs(model, batch)
    training = model.training
    model.eval()
    try:
        with set_forward_context(forward_context_of(batch)):
            own = logits_in(model(**{**batch, **inputs})).float()
        ours = logits_of(model)(hidden_of(model, batch)).float()
    finally:
        model.train(training)
    # the same modules run in the same order: any difference beyond rounding is a missed transform
    if own.shape == ours.shape and torch.allclose(own, ours, rtol=1e-4, atol=1e-5):
        return anatomy
    pooled = "input_ids" in batch and own.dim() == 2  # one row of logits for a text is the plan
    if not pooled:
        warnings.warn(
            f"{type(model).__name__}: its logits are more than head(hidden); shoal uses the "
            "model's own logits, which takes more memory (the loss is not chunked)",
            stacklevel=2,
        )
    model.shoal_whole_logits = True  # type: ignore[assignment]
    return replace(anatomy, whole_logits=True)


def example_of(model: nn.Module, *, num_tokens: int = 8) -> dict[str, Tensor]:
    """One small sample that the model takes: tokens, tokens of both sides, or an image."""
    device, config = next(model.parameters()).device, _config(model)
    shape: tuple[int, ...]
    if getattr(model, "main_input_name", "") == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (1, config.num_channels, height, width)
        dtype = next(model.parameters()).dtype
        pixels = torch.linspace(-1, 1, math.prod(shape), device=device, dtype=dtype)
        return {"pixel_values": pixels.view(shape)}
    positions = torch.arange(num_tokens, device=device)[None]
    if getattr(model, "main_input_name", "") == "input_features":  # a spectrogram (Whisper)
        bands, frames = config.num_mel_bins, 2 * config.max_source_positions
        features = torch.linspace(-1, 1, bands * frames, device=device).view(1, bands, frames)
        features = features.to(next(model.parameters()).dtype)
        return {"input_features": features, "decoder_input_ids": positions % config.vocab_size}
    ids = positions % config.vocab_size
    if config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return {"input_ids": ids, "position_ids": positions}


def _config(model: nn.Module) -> Any:
    return model.config


def _blocks_path(base: nn.Module, corrected: str | None, model: nn.Module) -> str:
    if corrected is not None and _is_list(base, corrected):
        return corrected
    config: Any = model.config
    depth = getattr(config, "num_hidden_layers", None)
    lists = [(path, each) for path, each in base.named_modules() if type(each) is nn.ModuleList]
    for path, module in lists:
        if len(module) == depth:
            return path
    for path, module in lists:  # blocks that are shared, or counted in another way
        if len(module) and not any(isinstance(each, nn.ModuleList) for each in module):
            return path
    raise ModelError(
        f"{type(model).__name__}: found no list of {depth} blocks in its base model\n"
        f"    the family {config.model_type!r} needs an entry in legal/families"
    )


def _more_blocks(base: nn.Module, blocks: str) -> tuple[str, ...]:
    """Further lists of the name that the first has: a decoder's blocks after an encoder's."""
    leaf = blocks.rpartition(".")[2]
    return tuple(
        path
        for path, module in base.named_modules()
        if isinstance(module, nn.ModuleList)
        and path.rpartition(".")[2] == leaf
        and not f"{path}.".startswith(blocks + ".")
    )


def _norm_path(
    base: nn.Module, corrected: str | None, blocks: str, config: Any, dotted: str
) -> str | None:
    """The norm after the blocks: corrected, else what transformers' pipeline plan puts last."""
    if corrected is None:
        plan = [key for key in getattr(config, "base_model_pp_plan", None) or {} if key != blocks]
        named = plan or [name for name, _ in base.named_children() if name != blocks]
        corrected = next((name for name in reversed(named) if "norm" in name), None)
    if corrected is None or corrected not in dict(base.named_modules()):
        return None
    return dotted + corrected


def _is_list(base: nn.Module, path: str) -> bool:
    try:
        return isinstance(base.get_submodule(path), nn.ModuleList)
    except AttributeError:
        return False


def _embedding_paths(model: nn.Module, blocks: str) -> Iterator[str]:
    tokens = model.get_input_embeddings()  # type: ignore[operator]
    found = [(path, module) for path, module in model.named_modules() if path]
    yield from (path for path, module in found if module is tokens)
    for path, module in found:
        outside = not path.startswith(blocks + ".")
        if isinstance(module, nn.Embedding) and module is not tokens and outside:
            yield path


def _head_path(model: nn.Module, base: str) -> str | None:
    """The output embedding, else the last linear layer outside the base model."""
    corrected = family_of(_config(model).model_type).head
    if corrected is not None:
        return corrected if hasattr(model, corrected) else None
    wrapped: Any = model
    output = wrapped.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not base or not hasattr(model, base):
        return next((path for path, each in model.named_modules() if each is output), None)
    last = None
    for path, module in model.named_modules():
        outside = path and path != base and not path.startswith(base + ".")
        if outside and module is output:
            # an encoder's head transforms before it decodes: all of it is the head
            return path if "." not in path else path.split(".")[0]
        if outside and isinstance(module, nn.Linear):
            last = path
    return last


def _dropouts_after(model: nn.Module, base: str) -> Iterator[str]:
    """Dropout between base model and head: a direct child of the model, applied before the head."""
    for name, child in model.named_children():
        if name != base and "Dropout" in type(child).__name__:
            yield name
