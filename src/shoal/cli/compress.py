"""shoal compress: a smaller model, and what it cost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from shoal.cli.terminal import say
from shoal.cli.train import Overrides

Quantise = Annotated[
    str | None,
    typer.Option(
        metavar="FORM",
        help="One of int8, int8-dynamic, int4, gguf-f16, gguf-q8_0, gguf-q4_0, gguf-q4_1.",
    ),
]
Method = Annotated[
    str, typer.Option(metavar="nearest|gptq|awq|qat", help="How weights are rounded.")
]
Prune = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KIND",
        help="One of layers:4, width:0.25, wanda:0.5, sparsegpt:2:4; repeatable.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(help="Threads; the result is the same for any number."),
]


def compress(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run or a model folder.")],
    out: Annotated[Path, typer.Option(help="New folder for the model.")],
    calibrate: Annotated[
        str, typer.Option(metavar="DATA", help="Text for calibration and for the loss.")
    ],
    overrides: Overrides = None,
    quantise: Quantise = None,
    method: Method = "nearest",
    group: Annotated[
        int | None, typer.Option(help="Inputs that share a scale; all of a row if not given.")
    ] = None,
    prune: Prune = None,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="PART", help="Layers that stay as they are.")
    ] = None,
    recover: Annotated[
        int, typer.Option(metavar="STEPS", help="Train it by what it was before.")
    ] = 0,
    calibration_samples: Annotated[
        int, typer.Option(min=1, help="Rows of text that layers are seen on.")
    ] = 128,
    sequence_tokens: Annotated[int, typer.Option(min=8, help="Tokens of a row.")] = 512,
    limit_loss: Annotated[
        float | None, typer.Option(help="Write nothing if the loss grows by more.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write it all the same.")] = False,
    workers: Workers = None,
    seed: Annotated[int, typer.Option(help="Of the rows, and of the training.")] = 0,
) -> None:
    """Round or prune the weights of a language model, and measure what that cost.

    Blocks, heads and channels are left out first, then weights become zeros, then --recover trains
    what is left (keys of a recipe set how, such as parallel.replicate=2), then weights are rounded.
    DIR/compression.json has the loss before and after on the same tokens.
    """
    from shoal.launch.compressing import compress as run
    from shoal.launch.compression import Wanted
    from shoal.observe.console import Console

    wanted = Wanted(
        model=model,
        out=out,
        calibrate=calibrate,
        quantise=quantise,
        method=method,
        group=group,
        prune=tuple(prune or ()),
        keep=tuple(keep or ()),
        samples=calibration_samples,
        tokens=sequence_tokens,
        recover=recover,
        limit_loss=limit_loss,
        force=force,
        seed=seed,
        workers=workers,
        overrides=tuple(overrides or ()),
    )
    with Console(out=sys.stderr) as console:
        found = run(wanted, console=console)
    say(
        f"{out}: loss {found['loss_before']:.4f} before, {found['loss_after']:.4f} after "
        f"({found['loss_change']:+.4f} +- {found['standard_error']:.4f}), the same likeliest token "
        f"at {found['agreement']:.1%}; {found['bytes_before'] / 1e6:.1f} MB before, "
        f"{found['bytes_after'] / 1e6:.1f} MB after{_speed(found)}"
    )
    for note in found["notes"]:
        say(note)


def _speed(found: dict[str, Any]) -> str:
    before, after = found["tokens_per_second_before"], found["tokens_per_second_after"]
    return f"; {before:.1f} tokens a second before, {after:.1f} after" if after else ""
