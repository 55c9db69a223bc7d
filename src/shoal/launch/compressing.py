"""From `shoal compress` to a folder: data, pruning, recovery by training, rounding, measuring."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.config.load import resolve
from shoal.errors import DataError, UserError
from shoal.launch.compression import Wanted
from shoal.launch.local import train
from shoal.launch.prepare import model_folder, prepare_inputs
from shoal.layout import Share
from shoal.observe.console import Console
from shoal.serve.reading import model_directory, read_model

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from shoal.compress.gguf_words import Words
    from shoal.compress.workers import Workers
    from shoal.models.grid import Coded

AUTO_CLASS = "AutoModelForCausalLM"
REPORT = "compression.json"
_MEASURED = 32
"""Validation samples that the loss is measured on."""
_TIMED_TOKENS = 32
"""Made by the engine, to say how fast it is."""


@dataclass
class Made:
    """A compressed model in memory."""

    model: Any
    coded: dict[str, Coded]
    """Layers on a grid, by path."""
    stored: dict[str, np.ndarray] | None = None
    """Of a GGUF file: the bytes of each tensor."""
    words: Words | None = None


def compress(wanted: Wanted, *, console: Console) -> dict[str, Any]:
    """Write the compressed model to `wanted.out`; what compression.json says of it.

    Raises UserError also where the loss grows by more than `limit_loss`: then nothing is written.
    """
    from shoal.compress.workers import Workers

    began = time.monotonic()
    console.phase("reading the data and the model")
    folder = _folder_of(wanted.model, console=console)
    words = _words(wanted, folder)
    calibration, validation, digest = _tokens(wanted, folder=folder, console=console)
    about = {
        "calibration": {"source": wanted.calibrate, "samples": sum(map(len, calibration))},
        "calibration_hash": digest,
    }
    with (
        tempfile.TemporaryDirectory(prefix="shoal-") as scratch,
        Workers(wanted.workers) as workers,
    ):
        made = _compressed(
            wanted, folder, Path(scratch), batches=calibration, workers=workers, console=console
        )
        made.words = words
        cost = _cost(wanted, folder, made, batches=validation, workers=workers, console=console)
    return _written(
        wanted,
        folder,
        made,
        about={**cost, **about},
        ids=validation[0],
        began=began,
        console=console,
    )


def _words(wanted: Wanted, folder: Path) -> Words | None:
    """For GGUF: the tokenizer, and whether the family can be written. Raises UserError."""
    if not wanted.is_gguf:
        return None
    from shoal.compress import gguf
    from shoal.models.pretrained import folder_config

    return gguf.check(folder_config(folder, auto_class=AUTO_CLASS), folder)


def _folder_of(model: str, *, console: Console) -> Path:
    local = Path(model).expanduser()
    return model_directory(local) if local.exists() else model_folder(model, say=console.phase)


def _recipe(wanted: Wanted, *, folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "seed": wanted.seed,
        "task": {"kind": "causal-lm"},
        "model": {"kind": "pretrained", "path": str(folder), "dropout": "off"},
        "data": {
            "source": wanted.calibrate,
            "sequence_tokens": wanted.tokens,
            "packing": True,
            "tokenizer": {"kind": "model"},
            "validation": {"fraction": 0.05},
        },
        **more,
    }


def _tokens(
    wanted: Wanted, *, folder: Path, console: Console
) -> tuple[list[Tensor], list[Tensor], str]:
    """Token ids [n, T] of calibration and of validation, and a hash of the former. DataError."""
    import torch
    import xxhash

    from shoal.data.stream import Evaluation, Stream

    recipe = resolve(_recipe(wanted, folder=folder, train={"steps": 1}), [])
    inputs = prepare_inputs(recipe, say=console.phase, progress=console.progress)
    data = Path(inputs.data_directory)
    stream = Stream(data, seed=wanted.seed, global_batch_samples=inputs.train_samples)
    count = min(inputs.train_samples, 2 * wanted.samples)  # some are not full
    batch = stream.at(0, Share(0, count))
    rows = torch.from_numpy(batch["input_ids"][_full(batch)][: wanted.samples]).long()
    if not len(rows):
        raise DataError(
            f"--calibrate {wanted.calibrate}: no row of {wanted.tokens} tokens is full\n"
            "    give more text, or fewer --sequence-tokens"
        )
    if len(rows) < wanted.samples:
        console.phase(f"{len(rows)} full rows of {wanted.tokens} tokens for calibration")
    held = Evaluation(data, batch_samples=_MEASURED, samples=None).at(0, part=0, parts=1)
    scored = torch.from_numpy(held["input_ids"][_full(held)]).long()
    if not len(scored):
        raise DataError(
            f"--calibrate {wanted.calibrate}: its validation part has no full row of "
            f"{wanted.tokens} tokens\n    give more text, or fewer --sequence-tokens"
        )
    return (
        _batches(rows),
        _batches(scored),
        xxhash.xxh3_64(rows.numpy().tobytes()).hexdigest(),
    )


def _batches(rows: Tensor) -> list[Tensor]:
    """Parts of one shape, of at most 8 rows: what a block was told of the first holds for all."""
    return list(rows.split(next(size for size in (8, 4, 2, 1) if len(rows) % size == 0)))


def _full(batch: dict[str, Any]) -> Any:
    """Which rows have a token at every place."""
    documents = batch.get("document_ids")
    if documents is None:
        return (batch["labels"][:, :-1] >= 0).all(axis=1)
    return (documents >= 0).all(axis=1)


def _compressed(
    wanted: Wanted,
    folder: Path,
    scratch: Path,
    *,
    batches: list[Tensor],
    workers: Workers,
    console: Console,
) -> Made:
    """The compressed model in memory, and what of it is on a grid."""
    from shoal.compress import gguf
    from shoal.compress.blocks import Pruning, Rounding, compress_blocks
    from shoal.compress.write import write
    from shoal.models.anatomy import anatomy_of

    def blocks(model: Any, how: Rounding | Pruning) -> dict[str, Coded]:
        return compress_blocks(
            model,
            anatomy_of(model),
            batches,
            how,
            workers=workers,
            keep=wanted.keep,
            say=console.progress,
        )

    model = read_model(folder, auto_class=AUTO_CLASS)
    _check_experts(wanted, model)
    structure = wanted.structure()
    if structure.blocks:
        model = _shortened(
            model, structure.blocks, batches=batches, workers=workers, console=console
        )
    if structure.narrower.heads or structure.narrower.channels:
        model = _narrowed(wanted, model, batches=batches, workers=workers, console=console)
    for pruning in structure.zeros:
        console.phase(f"pruning by {pruning.method}")
        blocks(model, pruning)
    if wanted.recover:
        pruned = scratch / "pruned"
        write(model, auto_class=AUTO_CLASS, source=folder, out=pruned, coded={})
        run = _recovered(wanted, folder=folder, pruned=pruned, run=scratch / "recovery")
        model = read_model(run, auto_class=AUTO_CLASS)
    rounding = wanted.rounding()
    made = Made(model, {})
    if rounding is not None:
        console.phase(f"rounding to {wanted.quantise} ({wanted.method})")
        made.coded = blocks(model, rounding)
        _check_packable(wanted, made)
    if wanted.is_gguf:
        console.phase(f"rounding to {wanted.quantise}")
        made.stored = gguf.encode(model, gguf.KINDS[str(wanted.quantise)], made.coded)
    return made


def _check_experts(wanted: Wanted, model: Any) -> None:
    """Raise UserError for a mixture that would be rounded."""
    from shoal.models.experts import experts_of

    if wanted.quantise is not None and experts_of(model):
        raise UserError(
            f"--quantise {wanted.quantise}: {model.config.model_type} is a mixture of experts, and "
            "transformers opens none whose weights are packed\n    prune it instead: layers:1, "
            "heads:0.25, wanda:0.5 or sparsegpt:0.5, which experts take part in"
        )


def _check_packable(wanted: Wanted, made: Made) -> None:
    """Raise UserError where rounded inputs would be lost, for a folder cannot tell of them."""
    from shoal.compress.write import can_pack

    if wanted.is_dynamic and not can_pack(made.model, made.coded):
        raise UserError(
            f"--quantise int8-dynamic: the layers of {made.model.config.model_type} are stored "
            "turned round, for which compressed-tensors has no form\n"
            "    nearest: --quantise gguf-q8_0, or int8"
        )


def _shortened(
    model: Any, count: int, *, batches: list[Tensor], workers: Workers, console: Console
) -> Any:
    from shoal.compress.shorten import influences, without_blocks
    from shoal.models.anatomy import anatomy_of

    console.phase("finding the blocks that change least")
    anatomy = anatomy_of(model)
    each = influences(model, anatomy, batches, workers)
    dropped = sorted(sorted(range(len(each)), key=lambda number: each[number])[:count])
    console.phase(f"without blocks {', '.join(map(str, dropped))}")
    return _rebuilt(*without_blocks(model, anatomy, dropped=dropped))


def _narrowed(
    wanted: Wanted, model: Any, *, batches: list[Tensor], workers: Workers, console: Console
) -> Any:
    from shoal.compress.width import narrowed
    from shoal.models.anatomy import anatomy_of

    console.phase("finding the heads and channels that matter least")
    config, tensors = narrowed(
        model,
        anatomy_of(model),
        batches,
        wanted.structure().narrower,
        auto_class=AUTO_CLASS,
        workers=workers,
    )
    return _rebuilt(config, tensors)


def _rebuilt(config: Any, tensors: dict[str, Tensor]) -> Any:
    """A model of another size, with these parameters."""
    from shoal.models.huggingface import build_meta
    from shoal.models.init import materialise, record
    from shoal.models.stored import InMemory

    model: Any = build_meta(config, auto_class=AUTO_CLASS, kernel="eager")
    return materialise(model, record=record(model), seed=0, source=InMemory(tensors)).eval()


def _recovered(wanted: Wanted, *, folder: Path, pruned: Path, run: Path) -> Path:
    """The model folder of a run that teaches the pruned model what the whole one says."""
    recipe = _recipe(
        wanted,
        folder=pruned,
        task={"kind": "distillation", "teacher": str(folder), "teacher_weight": 0.5},
        train={
            "steps": wanted.recover,
            "global_batch_samples": 8,
            "evaluate_every_steps": 0,
            "keep_zeros": bool(wanted.structure().zeros),
            "quantise": _on_grid(wanted),
            "optimizer": {"kind": "adamw", "learning_rate": 2.0e-4, "weight_decay": 0.0},
            "schedule": {"kind": "cosine", "warmup_steps": max(1, wanted.recover // 20)},
        },
        checkpoint={"every_steps": 0, "keep_best": False},
    )
    recipe["data"]["evaluation_samples"] = 8  # what all of it cost is measured at the end
    return train(recipe, wanted.overrides, out=run).run / "model"


def _on_grid(wanted: Wanted) -> dict[str, Any] | None:
    """The grid that training sees, where it sees one: that of the rounding to come."""
    rounding = wanted.rounding()
    if wanted.method != "qat" or rounding is None:
        return None
    grid = rounding.grid
    return {"bits": grid.bits, "group": grid.group, "half": grid.half, "keep": list(wanted.keep)}


def _cost(
    wanted: Wanted,
    folder: Path,
    made: Made,
    *,
    batches: Sequence[Tensor],
    workers: Workers,
    console: Console,
) -> dict[str, Any]:
    """What compression cost on validation samples. Raises UserError above `limit_loss`."""
    from contextlib import nullcontext

    from shoal.compress.inputs import rounded_inputs
    from shoal.compress.measure import difference

    console.phase("measuring what it cost")
    before = read_model(folder, auto_class=AUTO_CLASS)
    rounded = rounded_inputs(made.model, list(made.coded)) if wanted.is_dynamic else nullcontext()
    with rounded:
        cost = difference(before, made.model, batches, workers=workers, say=console.progress)
    limit = wanted.limit_loss
    if limit is not None and not cost.loss_change <= limit and not wanted.force:  # nor where NaN
        raise UserError(
            f"the loss grows by {cost.loss_change:.4f} (+- {cost.standard_error:.4f}), above "
            f"--limit-loss {limit:g}: nothing was written\n"
            "    compress less, recover longer, or write it all the same with --force"
        )
    return cost.to_json()


def _written(
    wanted: Wanted,
    folder: Path,
    made: Made,
    *,
    about: dict[str, Any],
    ids: Tensor,
    began: float,
    console: Console,
) -> dict[str, Any]:
    """Write the model and, once all is known of it, compression.json; then it appears as `out`."""
    from shoal.compress.write import bytes_of
    from shoal.models.export import beside

    console.phase(f"writing {wanted.out}")
    with beside(wanted.out) as partial:
        new = partial / "made"
        _write_model(wanted, folder, made, new)
        apart = _reload_difference(wanted, made, new, ids[:1])
        console.phase("timing the engine before and after")
        prompt = ids[0, : max(1, min(_TIMED_TOKENS, ids.shape[1] // 2))].tolist()
        report = {
            **about,
            "quantise": wanted.quantise,
            "method": wanted.method if wanted.quantise else None,
            "group": wanted.group,
            "prune": list(wanted.prune),
            "recover_steps": wanted.recover,
            "seed": wanted.seed,
            "bytes_before": bytes_of(folder),
            "bytes_after": bytes_of(new),
            "tokens_per_second_before": _tokens_per_second(folder, prompt),
            "tokens_per_second_after": None if wanted.is_gguf else _tokens_per_second(new, prompt),
            "reload_difference": apart,
            "seconds": time.monotonic() - began,
            "notes": wanted.notes(),
        }
        (new / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        new.rename(wanted.out)
    return report


def _write_model(wanted: Wanted, folder: Path, made: Made, out: Path) -> None:
    from shoal.compress import gguf
    from shoal.compress.write import write

    if made.stored is None or made.words is None:
        write(
            made.model,
            auto_class=AUTO_CLASS,
            source=folder,
            out=out,
            coded=made.coded,
            dynamic=wanted.is_dynamic,
        )
        return
    out.mkdir()
    gguf.write(
        out / gguf.FILE,
        made.model,
        kind=gguf.KINDS[str(wanted.quantise)],
        stored=made.stored,
        words=made.words,
        name=wanted.out.name,
    )


def _tokens_per_second(folder: Path, prompt: list[int]) -> float:
    """Of one sequence in the serve engine, after the first token, on this machine as it is now."""
    from shoal.serve.generate import room, writer_of

    writer, times = writer_of(folder), []
    writer.write(
        prompt,
        tokens=min(_TIMED_TOKENS, room(writer.config, taken=len(prompt))),
        temperature=0.0,
        seed=0,
        ends=(),
        told=lambda token: times.append(time.monotonic()),
    )
    spent = times[-1] - times[0]
    return (len(times) - 1) / spent if spent > 0 else 0.0


def _reload_difference(wanted: Wanted, made: Made, folder: Path, ids: Tensor) -> float:
    """Largest difference of a logit of what was written, read again."""
    import copy

    import torch

    from shoal.compress import gguf

    if made.stored is None:
        again = read_model(folder, auto_class=AUTO_CLASS)
    else:
        again = copy.deepcopy(made.model)
        gguf.read_again(folder / gguf.FILE, again, gguf.KINDS[str(wanted.quantise)])
    with torch.no_grad():
        ours, theirs = (each(input_ids=ids, use_cache=False).logits for each in (made.model, again))
    return float((ours - theirs).abs().max())
