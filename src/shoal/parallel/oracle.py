"""Holds a model against transformers as its users call it, before a run starts.

A small model of the same kind is built twice with the same weights: as transformers builds it for
anyone (eager attention, called with input_ids, attention_mask and labels) and as shoal trains it.
In float64, on rows of unequal length, padded and (where the recipe packs) in one row, the task's
logits and loss must agree within rounding. Beside it, three probes of shoal's model alone: nothing
before a changed last token moves (causality), the same tokens give the same output whatever was
computed with or before them (rotary frequencies that depend on the call), and training mode drops
nothing where dropout is off.

Shapes: B rows, T tokens, V labels or vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shoal.data.batch import stack
from shoal.data.pack import Part, Shape
from shoal.data.write import EncodedSamples, write_parts
from shoal.errors import ModelError
from shoal.models import init
from shoal.models.anatomy import (
    anatomy_of,
    canonical_parameters,
    check_logits,
    logits_in,
    logits_of,
)
from shoal.models.dropout import apply_keyed, wants_dropout
from shoal.models.experts import keep_corrections
from shoal.models.huggingface import build_meta, build_reference
from shoal.models.probe import probe_keyed_dropout
from shoal.models.routing import balance_of
from shoal.models.small import small_configs
from shoal.models.stored import InMemory
from shoal.parallel.model import ModelSettings
from shoal.tasks.task import Batch, Output, Task

TOLERANCE = 1e-5
"""Of the largest logit, and of the loss. Measured: up to 3e-7, since transformers computes softmax,
norms and losses in float32 also in a float64 model; 2e-6 behind a cap of logits at 0.05. What is
wrong differs by 1e-3 and more."""

_MOST_PARAMETERS = 50_000_000
"""Of the small model: in float64, and twice, it must fit beside a run."""

_ROW = 64
"""Tokens of a packed row: all specimens fit into one."""


@dataclass(frozen=True)
class Verdict:
    """What was found; JSON-able by `to_json`."""

    problems: tuple[str, ...] = ()
    """Why this model would train wrongly; empty: it is right."""
    notes: tuple[str, ...] = ()
    """What is done differently for this family, such as attention of its own."""
    difference: float = 0.0
    """Largest difference of logits, relative to the largest logit; and of the loss."""
    packs: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Pair:
    """The same weights in both; eval mode, float64 where transformers runs the family in it."""

    theirs: nn.Module
    ours: nn.Module
    config: Any

    @property
    def tolerance(self) -> float:
        """By the type they compute in."""
        single = next(self.theirs.parameters()).dtype == torch.float32
        return 1e2 * TOLERANCE if single else TOLERANCE

    def call(self, task: Task, batch: Batch) -> Any:
        """What transformers makes of a batch: its output, with loss and logits."""
        dtype = next(self.theirs.parameters()).dtype
        inputs = {name: _as(each, dtype) for name, each in task.user_call(batch).items()}
        with torch.no_grad():
            return self.theirs(**inputs)


def examine(
    settings: ModelSettings,
    *,
    task: Task,
    packing: bool,
    sequence_tokens: int,
    is_drawn: bool = True,
) -> Verdict:
    """Hold a small model of the same kind against transformers. Computes for about half a second.

    `sequence_tokens`: of a row of the run, for the probe of rotary positions. `is_drawn`: its first
    weights are those of its own initialisation. Raises ModelError for a model that cannot be built
    or run at all.
    """
    pair = pair_of(settings, task=task)
    if is_drawn:
        _check_drawn(pair.ours, settings, config=pair.config)
    ours = pair.ours
    notes, problems, differences = [], [], [0.0]
    if getattr(ours, "shoal_own_attention", False):
        notes.append("attention of its own")
    if getattr(ours, "shoal_whole_logits", False):
        notes.append("logits of its own: the loss is not chunked")
    if getattr(ours, "shoal_first_position", 0):
        notes.append(f"positions from {ours.shoal_first_position} on")
    rows = _rows(task, pair.config, packing=False)
    for difference, problem in _padded(pair, task, rows):
        differences.append(difference)
        problems += [problem] if difference > pair.tolerance else []
    if problems and (seen := _padding_seen(pair, task, rows)):
        problems = [seen]
    if not problems:
        problems += _alone(pair, task, rows)
    packed = 0.0
    if task.packs and not problems:
        packed = _packed(pair, task)
    if packing and not task.packs:
        problems.append("its rows hold one sample each\n    set data.packing to false")
    elif packing and packed > pair.tolerance:
        problems.append(
            f"a document in a packed row differs from the same document alone by {packed:.1e}: it "
            "sees its neighbours, or other positions\n    set data.packing to false"
        )
    if not problems:
        problems += _at_far_positions(pair, task, sequence_tokens=sequence_tokens, rows=rows)
    if not problems:
        problems += _when_training(settings, pair, task=task, rows=rows)
    differences += [packed] if packing else []
    return Verdict(
        tuple(problems),
        tuple(notes),
        max(differences),
        packs=task.packs and packed <= pair.tolerance,
    )


def pair_of(settings: ModelSettings, *, task: Task) -> Pair:
    """The smallest model of the kind that transformers can run. Raises ModelError."""
    failure: Exception | None = None
    for config in small_configs(settings.config):
        try:
            theirs = _theirs(settings, config, task)
        except Exception as error:  # sizes that do not go together, or a class of another use
            failure = failure or error
            continue
        try:
            return Pair(theirs, _ours(settings, config, theirs), config)
        except Exception as error:  # it is called in a way that shoal does not know
            what = "it is not called as shoal calls models"
            raise _refusal(config, task, what, error) from error
    assert failure is not None, "there is at least one configuration"
    raise _refusal(settings.config, task, "transformers cannot run it on its rows", failure)


def _refusal(config: Any, task: Task, what: str, error: Exception) -> ModelError:
    """`error` as what a user is told of it; a ModelError says it already."""
    if isinstance(error, ModelError):
        return error
    said = (str(error).strip().splitlines() or [""])[0][:200]
    return ModelError(
        f"{config.model_type} for the task {task.kind}: {what} ({type(error).__name__}: {said})\n"
        "    use another architecture"
    )


def _theirs(settings: ModelSettings, config: Any, task: Task) -> nn.Module:
    """transformers' model, in float64 where it runs in that. Raises what it raises."""
    _check_size(config, auto_class=settings.auto_class)
    config._experts_implementation = "eager"  # the others have no float64
    with torch.random.fork_rng(devices=[]):  # the same verdict at every call
        torch.manual_seed(0)
        model = build_reference(config, auto_class=settings.auto_class)
    keep_corrections(model)
    _stir(model)
    rows = _rows(task, config, packing=False)
    call = task.user_call(rows)
    try:
        with torch.no_grad():
            logits = logits_in(model.double()(**call))
        is_finite = bool(_real(rows, logits).isfinite().all())
    except Exception:
        is_finite = False
    if not is_finite:  # masks and kernels that know float32 only
        with torch.no_grad():
            model.float()(**{name: _as(each, torch.float32) for name, each in call.items()})
    return model


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _check_size(config: Any, *, auto_class: str) -> None:
    """Raise ModelError for a model that would take long to try."""
    model = build_meta(config, auto_class=auto_class)
    count = sum(each.numel() for each in model.parameters())
    if count > _MOST_PARAMETERS:
        raise ModelError(
            f"{config.model_type}: it cannot be made small enough to be held against transformers "
            f"(its sizes have names that shoal does not know; {count:,} parameters are left)\n"
            "    choose smaller sizes, or another architecture"
        )


@torch.no_grad()
def _stir(model: nn.Module) -> None:
    """Weights without zeros or ones that would hide a difference, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def _check_drawn(model: nn.Module, settings: ModelSettings, *, config: Any) -> None:
    """Raise ModelError, naming the parameter, where nothing initialises one."""
    record = init.record(build_meta(config, auto_class=settings.auto_class, dropout="off"))
    for name in canonical_parameters(model):
        record.program(name)


def _ours(settings: ModelSettings, config: Any, theirs: nn.Module) -> nn.Module:
    """shoal's model of `config` with their weights; marked where its logits need it."""
    model = build_meta(config, auto_class=settings.auto_class, dropout="off")
    weights = InMemory({name: each.float() for name, each in canonical_parameters(theirs).items()})
    init.materialise(model, record=init.record(model), seed=settings.seed, source=weights)
    model.to(next(theirs.parameters()).dtype).eval()
    model.shoal_balance = balance_of(model, "batch")  # type: ignore[assignment]  # as theirs is
    check_logits(model, anatomy_of(model))
    return model


def _rows(task: Task, config: Any, *, packing: bool) -> Batch:
    """The task's specimens as the data gives them to a model: [B, ...], or one packed row."""
    fields = task.fields
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        samples = EncodedSamples(Path(folder), fields=fields, where="specimens")
        specimens = task.specimens(config)
        samples.add(specimens, hashes=range(len(specimens)))
        about = write_parts(
            samples, sequence_tokens=_ROW, packing=packing, validation_fraction=0.0, seed=0
        )
        shape = Shape.from_json(about["shape"])
        number = about["parts"]["train"]["samples"]
        part = Part(Path(folder), part="train", shape=shape, num_samples=number)
        batch = stack([part.row(each) for each in range(number)], fields, lengths=shape.lengths)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


@torch.no_grad()
def _run(model: nn.Module, task: Task, batch: Batch) -> tuple[Output, Tensor]:
    """Output and logits [B, ..., V] of shoal's model."""
    output = task.output(model, anatomy_of(model), batch)
    return output, logits_of(model)(output.hidden)


def _real(batch: Batch, logits: Tensor) -> Tensor:
    """Logits [N, V] of what is no padding; [B, V] where a text has one row of them."""
    if "document_ids" not in batch or logits.dim() == 2:
        return logits
    return logits[batch["document_ids"] >= 0]


def _apart(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest value; infinite for other shapes or NaN."""
    if found.shape != wanted.shape:
        return float("inf")
    scale = float(wanted.abs().max().clamp(min=1e-6))
    difference = float((found.double() - wanted.double()).abs().max()) / scale
    return difference if difference == difference else float("inf")


def _padded(pair: Pair, task: Task, rows: Batch) -> Iterator[tuple[float, str]]:
    """(difference, what it would mean) of logits and loss on padded rows."""
    theirs = pair.call(task, rows)
    output, logits = _run(pair.ours, task, rows)
    apart = _apart(_real(rows, logits), _real(rows, logits_in(theirs)))
    yield apart, f"its logits differ from transformers' by {apart:.1e} on padded rows"
    with torch.no_grad():
        loss = float(output.total()) / task.count(rows)
    if getattr(theirs, "loss", None) is not None:
        wanted = float(theirs.loss)
    elif type(task).user_losses is not Task.user_losses:  # transformers has none, or another
        total, count = task.user_losses(theirs, rows)
        wanted = total / count
    else:  # the task has a loss of its own, and `user_call` gives no labels
        return
    apart = abs(loss - wanted) / max(abs(wanted), 1e-6)
    yield apart, f"its loss is {loss:.6g} where transformers' is {wanted:.6g}"


def documents_of(rows: Batch) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
    """Of each document of a batch of tokens: its row, its positions there, and it alone [1, T]."""
    shape = rows["document_ids"].shape
    for row, ids in enumerate(rows["document_ids"]):
        for number in ids[ids >= 0].unique():
            places = torch.nonzero(ids == number)[:, 0]
            alone = {}
            for name, each in rows.items():
                alone[name] = each[row : row + 1]
                if shape in (each.shape, each.shape[::2]):  # [B, T] or [B, N, T]
                    alone[name] = alone[name][..., places]
            alone["document_ids"] = torch.zeros_like(alone["document_ids"])
            yield row, places, alone


def _at(logits: Tensor, row: int, places: Tensor) -> Tensor:
    """Logits of the document at `places` of a row; a text's only ones where they are pooled."""
    return logits[row] if logits.dim() == 2 else logits[row, places]


def _padding_seen(pair: Pair, task: Task, rows: Batch) -> str | None:
    """Whether transformers itself gives a row other logits beside a longer one."""
    if "document_ids" not in rows:
        return None
    together = logits_in(pair.call(task, rows))
    for row, places, one in documents_of(rows):
        apart = _apart(logits_in(pair.call(task, one))[0], _at(together, row, places))
        if apart > pair.tolerance:
            return (
                f"its own code sees padding ({apart:.1e} in transformers), so its loss depends on "
                "what else is in a batch\n    use another architecture"
            )
    return None


def _alone(pair: Pair, task: Task, rows: Batch) -> list[str]:
    """Causality, and each row by itself without its padding."""
    ours = pair.ours
    if "document_ids" not in rows:
        return []
    _, together = _run(ours, task, rows)
    problems = []
    for row, places, one in documents_of(rows):
        _, alone = _run(ours, task, one)
        if (apart := _apart(alone[0], _at(together, row, places))) > pair.tolerance:
            problems.append(
                f"a row gives other logits beside a longer one ({apart:.1e}): it sees padding"
            )
            break
    if task.causal:
        changed = dict(rows)
        ids = rows["input_ids"].clone()
        last = (rows["document_ids"] >= 0).sum(1) - 1
        index = torch.arange(len(ids))
        ids[index, last] = ids[index, 0]
        changed["input_ids"] = ids
        _, moved = _run(ours, task, changed)
        before = torch.arange(ids.shape[1]) < last[:, None]
        if (apart := _apart(moved[before], together[before])) > pair.tolerance:
            problems.append(
                "a token sees those after it, so the loss would be of targets that it has seen "
                f"({apart:.1e})\n    use a decoder, or a task for encoders"
            )
    return problems


def _packed(pair: Pair, task: Task) -> float:
    """Largest difference between documents in a packed row and transformers on each alone."""
    rows = _rows(task, pair.config, packing=True)
    try:
        _, logits = _run(pair.ours, task, rows)
    except ModelError:
        return float("inf")
    apart = 0.0
    for row, places, one in documents_of(rows):
        apart = max(apart, _apart(_at(logits, row, places), logits_in(pair.call(task, one))[0]))
    return apart


def _at_far_positions(pair: Pair, task: Task, *, sequence_tokens: int, rows: Batch) -> list[str]:
    """Whether a row is computed alike after and beside one that ends a longest row of the run."""
    if "position_ids" not in rows:
        return []
    ours = pair.ours
    _, before = _run(ours, task, rows)
    far = dict(rows)
    shift = max(0, sequence_tokens - int(rows["position_ids"].max()) - 1)
    far["position_ids"] = rows["position_ids"] + shift
    both = {name: torch.cat([rows[name], far[name]]) for name in rows}
    try:
        _, beside = _run(ours, task, both)
    except (IndexError, RuntimeError):
        return [
            f"it has no position {sequence_tokens - 1}, which rows of {sequence_tokens} tokens "
            "need\n    set data.sequence_tokens to at most max_position_embeddings"
        ]
    _, after = _run(ours, task, rows)
    count = len(rows["input_ids"])
    apart = max(_apart(after, before), _apart(beside[:count], before))
    if apart <= pair.tolerance:
        return []
    return [
        f"a row gives other logits after or beside a longer one ({apart:.1e}): its rotary "
        "frequencies depend on the longest row of a call\n    set data.sequence_tokens to at most "
        "max_position_embeddings, or another rope_type (linear, yarn, llama3)"
    ]


def _when_training(settings: ModelSettings, pair: Pair, *, task: Task, rows: Batch) -> list[str]:
    """Training mode without dropout is eval mode; keyed dropout is the same at every call."""
    ours = pair.ours
    if settings.dropout == "keyed" and wants_dropout(settings.config):
        try:
            check_keyed_dropout(settings, pair)
        except ModelError as error:
            return [str(error)]
    if settings.dropout == "framework":
        return []
    _, wanted = _run(ours, task, rows)
    ours.train()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # BART draws one number for each layer, whether or not it could be left out
            harmless = [float(torch.rand([])) for _ in range(1 + anatomy_of(ours).num_blocks)]
            torch.manual_seed(0)
            _, found = _run(ours, task, rows)
            draws = float(torch.rand([])) not in harmless
    finally:
        ours.eval()
    if (apart := _apart(_real(rows, found), _real(rows, wanted))) > pair.tolerance:
        return [
            f"training changes its logits ({apart:.1e}) though dropout is off: it draws numbers of "
            "its own, which have no key\n    use another architecture, or model.dropout=framework"
        ]
    if draws:  # that matter now and then only, such as where two experts are nearly even (PhiMoE)
        return [
            "in training it draws numbers of its own, which have no key\n    use another "
            "architecture, or model.dropout=framework"
        ]
    return []


def check_keyed_dropout(settings: ModelSettings, pair: Pair) -> None:
    """Raise ModelError where the small model drops values in ways that have no key."""
    model = build_meta(pair.config, auto_class=settings.auto_class, dropout="keyed")
    init.materialise(model, record=init.record(model), seed=settings.seed)
    apply_keyed(model, seed=settings.seed, asked=settings.config)
    probe_keyed_dropout(model)
