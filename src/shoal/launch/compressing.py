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
from shoal.launch.local import train
from shoal.launch.prepare import model_folder, prepare_inputs
from shoal.layout import Share
from shoal.observe.console import Console
from shoal.serve.reading import model_directory, read_model

if TYPE_CHECKING:
    from torch import Tensor

    from shoal.compress.blocks import Pruning, Rounding
    from shoal.compress.grid import Coded

AUTO_CLASS = "AutoModelForCausalLM"
REPORT = "compression.json"
QUANTISE = {"int8": 8, "int4": 4}
METHODS = ("nearest", "gptq")
_MEASURED = 32
"""Validation samples that the loss is measured on."""


@dataclass(frozen=True)
class Wanted:
    """What the command asks for."""

    model: str
    out: Path
    calibrate: str
    quantise: str | None = None
    method: str = "nearest"
    group: int | None = None
    prune: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    samples: int = 128
    tokens: int = 512
    recover: int = 0
    limit_loss: float | None = None
    force: bool = False
    seed: int = 0
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.quantise and not self.prune:
            raise UserError("nothing to do: give --quantise, --prune, or both")
        if self.quantise is not None and self.quantise not in QUANTISE:
            raise UserError(f"--quantise: expected {' or '.join(QUANTISE)}, got {self.quantise!r}")
        if self.method not in METHODS:
            raise UserError(f"--method: expected {' or '.join(METHODS)}, got {self.method!r}")
        if self.group is not None and self.group < 1:
            raise UserError(f"--group: expected at least 1, got {self.group}")
        if self.recover and not self.prune:
            raise UserError(
                "--recover trains what was pruned; rounding alone is not recovered\n"
                "    give --prune too, or leave --recover out"
            )
        if self.overrides and not self.recover:
            raise UserError("keys of a recipe are for the training of --recover: give it too")
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"{self.out}: it exists and is not empty; choose another --out")
        self.prunings()

    def rounding(self) -> Rounding | None:
        """How weights are rounded."""
        from shoal.compress.blocks import Rounding
        from shoal.compress.grid import Grid

        if self.quantise is None:
            return None
        return Rounding(Grid(QUANTISE[self.quantise], self.group), self.method)

    def prunings(self) -> tuple[int, list[Pruning]]:
        """Blocks that go, and how weights become zeros. Raises UserError."""
        from shoal.compress.blocks import Pruning
        from shoal.compress.masks import Sparsity

        blocks, found = 0, []
        for text in self.prune:
            kind, _, rest = text.partition(":")
            if kind == "layers" and rest.isdigit() and int(rest) > 0:
                blocks += int(rest)
            elif kind in ("wanda", "sparsegpt"):
                found.append(Pruning(Sparsity.parse(rest), kind))
            else:
                raise UserError(
                    "--prune: expected layers:N, wanda:SHARE, sparsegpt:SHARE or sparsegpt:2:4, "
                    f"got {text!r}"
                )
        return blocks, found


def compress(wanted: Wanted, *, console: Console) -> dict[str, Any]:
    """Write the compressed model to `wanted.out`; what compression.json says of it.

    Raises UserError also where the loss grows by more than `limit_loss`: then nothing is written.
    """
    began = time.monotonic()
    console.phase("reading the data and the model")
    folder = _folder_of(wanted.model, console=console)
    calibration, validation, digest = _tokens(wanted, folder=folder, console=console)
    with tempfile.TemporaryDirectory(prefix="shoal-") as scratch:
        made = _compressed(wanted, folder, Path(scratch), batches=calibration, console=console)
        return _measured(
            wanted,
            folder,
            made,
            batches=validation,
            calibrated={
                "calibration": {
                    "source": wanted.calibrate,
                    "samples": sum(map(len, calibration)),
                },
                "calibration_hash": digest,
            },
            began=began,
            console=console,
        )


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
        list(rows.split(8)),
        list(scored.split(8)),
        xxhash.xxh3_64(rows.numpy().tobytes()).hexdigest(),
    )


def _full(batch: dict[str, Any]) -> Any:
    """Which rows have a token at every place."""
    documents = batch.get("document_ids")
    if documents is None:
        return (batch["labels"][:, :-1] >= 0).all(axis=1)
    return (documents >= 0).all(axis=1)


def _compressed(
    wanted: Wanted, folder: Path, scratch: Path, *, batches: list[Tensor], console: Console
) -> tuple[Any, dict[str, Coded]]:
    """The compressed model in memory, and what of it is on a grid."""
    from shoal.compress.blocks import compress_blocks
    from shoal.compress.write import write
    from shoal.models.anatomy import anatomy_of

    model = read_model(folder, auto_class=AUTO_CLASS)
    blocks, prunings = wanted.prunings()
    if blocks:
        model = _shortened(model, blocks, batches=batches, console=console)
    for pruning in prunings:
        console.phase(f"pruning by {pruning.method}")
        compress_blocks(
            model,
            anatomy_of(model),
            batches,
            pruning,
            keep=wanted.keep,
            say=console.progress,
        )
    if wanted.recover:
        pruned = scratch / "pruned"
        write(model, auto_class=AUTO_CLASS, source=folder, out=pruned, coded={}, files={})
        run = _recovered(wanted, folder=folder, pruned=pruned, run=scratch / "recovery")
        model = read_model(run, auto_class=AUTO_CLASS)
    rounding = wanted.rounding()
    coded: dict[str, Coded] = {}
    if rounding is not None:
        console.phase(f"rounding to {wanted.quantise} ({wanted.method})")
        coded = compress_blocks(
            model,
            anatomy_of(model),
            batches,
            rounding,
            keep=wanted.keep,
            say=console.progress,
        )
    return model, coded


def _shortened(model: Any, count: int, *, batches: list[Tensor], console: Console) -> Any:
    from shoal.compress.shorten import influences, without_blocks
    from shoal.models.anatomy import anatomy_of
    from shoal.models.huggingface import build_meta
    from shoal.models.init import materialise, record
    from shoal.models.stored import InMemory

    console.phase("finding the blocks that change least")
    anatomy = anatomy_of(model)
    each = influences(model, anatomy, batches)
    dropped = sorted(sorted(range(len(each)), key=lambda number: each[number])[:count])
    config, tensors = without_blocks(model, anatomy, dropped=dropped)
    console.phase(f"without blocks {', '.join(map(str, dropped))}")
    shorter: Any = build_meta(config, auto_class=AUTO_CLASS, kernel="eager")
    return materialise(shorter, record=record(shorter), seed=0, source=InMemory(tensors)).eval()


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
            "keep_zeros": bool(wanted.prunings()[1]),
            "optimizer": {"kind": "adamw", "learning_rate": 2.0e-4, "weight_decay": 0.0},
            "schedule": {"kind": "cosine", "warmup_steps": max(1, wanted.recover // 20)},
        },
        checkpoint={"every_steps": 0, "keep_best": False},
    )
    return train(recipe, wanted.overrides, out=run).run / "model"


def _measured(
    wanted: Wanted,
    folder: Path,
    made: tuple[Any, dict[str, Coded]],
    *,
    batches: Sequence[Tensor],
    calibrated: dict[str, Any],
    began: float,
    console: Console,
) -> dict[str, Any]:
    from shoal.compress.measure import difference
    from shoal.compress.write import bytes_of, write

    model, coded = made
    console.phase("measuring what it cost")
    before = read_model(folder, auto_class=AUTO_CLASS)
    cost = difference(before, model, batches)
    if wanted.limit_loss is not None and cost.loss_change > wanted.limit_loss and not wanted.force:
        raise UserError(
            f"the loss grows by {cost.loss_change:.4f} (+- {cost.standard_error:.4f}), above "
            f"--limit-loss {wanted.limit_loss:g}: nothing was written\n"
            "    compress less, recover longer, or write it all the same with --force"
        )
    report = {
        **cost.to_json(),
        "quantise": wanted.quantise,
        "method": wanted.method if wanted.quantise else None,
        "group": wanted.group,
        "prune": list(wanted.prune),
        "recover_steps": wanted.recover,
        **calibrated,
        "seed": wanted.seed,
        "bytes_before": bytes_of(folder),
        "notes": _notes(wanted),
    }
    text = json.dumps(report, indent=1)
    console.phase(f"writing {wanted.out}")
    write(
        model,
        auto_class=AUTO_CLASS,
        source=folder,
        out=wanted.out,
        coded=coded,
        files={REPORT: text},
    )
    report |= {
        "bytes_after": bytes_of(wanted.out),
        "reload_difference": _reload_difference(model, wanted.out, batches[0][:1]),
        "seconds": time.monotonic() - began,
    }
    (wanted.out / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _reload_difference(model: Any, folder: Path, ids: Tensor) -> float:
    """Largest difference of a logit of the written folder, read again."""
    import torch

    again = read_model(folder, auto_class=AUTO_CLASS)
    with torch.no_grad():
        ours, theirs = (each(input_ids=ids, use_cache=False).logits for each in (model, again))
    return float((ours - theirs).abs().max())


def _notes(wanted: Wanted) -> list[str]:
    """What a person should not hope for."""
    found = []
    _, prunings = wanted.prunings()
    if prunings:
        found.append("zeros among the weights give no speed here: products are computed dense")
    if wanted.quantise == "int4":
        found.append("int4 is smaller on disk; on a CPU it is computed as floats, and no faster")
    return found
