"""What `shoal compress` is asked for, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.errors import UserError

if TYPE_CHECKING:
    from shoal.compress.blocks import Pruning, Rounding
    from shoal.compress.width import Narrower

QUANTISE = {
    "int8": 8,
    "int8-dynamic": 8,
    "int4": 4,
    "gguf-f16": 16,
    "gguf-q8_0": 8,
    "gguf-q4_0": 4,
    "gguf-q4_1": 4,
}
"""Forms of weights, and the bits of one."""
METHODS = ("nearest", "gptq", "awq", "qat")
_NEAREST_ONLY = ("gguf-f16", "gguf-q4_1")
GGUF_GROUP = 32
PRUNE = (
    "layers:N, width:SHARE, heads:SHARE, channels:SHARE, wanda:SHARE, sparsegpt:SHARE or "
    "sparsegpt:2:4"
)


@dataclass(frozen=True)
class Structure:
    """What of a model goes: blocks, heads and channels, and single weights."""

    blocks: int
    narrower: Narrower
    zeros: tuple[Pruning, ...]


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
    workers: int | None = None
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.quantise and not self.prune:
            raise UserError("nothing to do: give --quantise, --prune, or both")
        if self.quantise is not None and self.quantise not in QUANTISE:
            raise UserError(
                f"--quantise: expected one of {', '.join(QUANTISE)}, got {self.quantise!r}"
            )
        if self.method not in METHODS:
            raise UserError(f"--method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        self._check_form()
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers: expected at least 1, got {self.workers}")
        if self.recover and not self.prune and self.method != "qat":
            raise UserError(
                "--recover trains what was pruned; rounding alone is recovered by training on the "
                "grid\n    give --prune, or --method qat, or leave --recover out"
            )
        if self.overrides and not self.recover:
            raise UserError("keys of a recipe are for the training of --recover: give it too")
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"{self.out}: it exists and is not empty; choose another --out")
        self.structure()

    def _check_form(self) -> None:
        if self.group is not None and self.group < 1:
            raise UserError(f"--group: expected at least 1, got {self.group}")
        if self.quantise is None:
            if self.method != "nearest" or self.group is not None:
                raise UserError("--method and --group say how weights are rounded: give --quantise")
            return
        if self.group is not None and (self.is_gguf or self.is_dynamic):
            what = f"groups of {GGUF_GROUP}" if self.is_gguf else "a scale for each row"
            raise UserError(f"--group: {self.quantise} has {what}; leave --group out")
        if self.quantise in _NEAREST_ONLY and self.method != "nearest":
            raise UserError(
                f"--method {self.method}: {self.quantise} is rounded to the nearest; "
                "choose gguf-q8_0 or gguf-q4_0 for another method"
            )
        if self.method == "qat" and not self.recover:
            raise UserError("--method qat trains on the grid: give --recover STEPS too")

    @property
    def is_gguf(self) -> bool:
        """Whether a GGUF file is written instead of a folder."""
        return (self.quantise or "").startswith("gguf-")

    @property
    def is_dynamic(self) -> bool:
        """Whether inputs of layers are whole numbers too."""
        return self.quantise == "int8-dynamic"

    def rounding(self) -> Rounding | None:
        """How weights are rounded; None: not before they are written."""
        from shoal.compress.blocks import Rounding
        from shoal.models.grid import Grid

        if self.quantise is None or (self.is_gguf and self.method == "nearest"):
            return None
        method = "nearest" if self.method == "qat" else self.method
        grid = Grid(QUANTISE[self.quantise], self.group)
        if self.is_gguf:
            grid = Grid(grid.bits, GGUF_GROUP, half=True)
        return Rounding(grid, method)

    def structure(self) -> Structure:
        """What goes. Raises UserError."""
        from shoal.compress.blocks import Pruning
        from shoal.compress.masks import Sparsity
        from shoal.compress.width import Narrower

        blocks, shares, found = 0, {"heads": 0.0, "channels": 0.0}, []
        for text in self.prune:
            kind, _, rest = text.partition(":")
            if kind == "layers" and rest.isdigit() and int(rest) > 0:
                blocks += int(rest)
            elif kind in ("width", *shares):
                share = Sparsity.parse(rest)
                if share.width:
                    raise UserError(f"--prune {text}: expected a share between 0 and 1")
                shares |= dict.fromkeys(shares if kind == "width" else (kind,), share.share)
            elif kind in ("wanda", "sparsegpt"):
                found.append(Pruning(Sparsity.parse(rest), kind))
            else:
                raise UserError(f"--prune: expected {PRUNE}, got {text!r}")
        return Structure(blocks, Narrower(**shares), tuple(found))

    def notes(self) -> list[str]:
        """What a person should not hope for."""
        found = []
        if self.structure().zeros:
            found.append(
                "zeros among the weights give no speed here: products are computed dense (2:4 is "
                "faster on NVIDIA's sparse units only)"
            )
        if self.quantise == "int4":
            found.append(
                "int4 is smaller on disk; on a CPU it is computed as floats, and no faster"
            )
        if self.quantise == "int8":
            found.append("int8 is smaller on disk; here it is computed as floats, and no faster")
        if self.is_dynamic:
            found.append(
                "shoal reads these weights as floats and leaves inputs as they are; transformers "
                "rounds inputs too, without speed; vLLM computes with 8 bits on GPUs"
            )
        if self.is_gguf:
            found.append("llama.cpp opens this file; shoal serve opens folders")
        return found
