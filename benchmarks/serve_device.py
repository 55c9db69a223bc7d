"""Serving on a GPU: products that keep their bits, the certificate, speed, and the memory taken.

    python benchmarks/serve_device.py OUT [--model FOLDER] [--rehearse]

A llama of 1.2 billion parameters with random weights (speed does not depend on them), bfloat16,
prompts of 512 tokens and 128 made, beside transformers' `generate` of the same batch and its
continuous batching; every product's rows probed for bits that depend on how many there are; the
certificate of `--model`; int8 products, 2:4 zeros and the cache's bytes beside what was reckoned.
OUT gets figures.json. `--rehearse` does the same on a CPU with small sizes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from serve import continuous, generated, prompts_of, served
from shoal.config.serve import serve_settings
from shoal.launch.certifying import certify_folder
from shoal.serve.exact import way_for
from shoal.serve.reading import read_model
from shoal.serve.runner import Runner, load

SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
TINY = {
    **SIZES,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}


class Bench:
    """The device, the sizes, and what was found."""

    def __init__(self, out: Path, *, rehearse: bool) -> None:
        self.out, self.rehearse = out, rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.sizes = TINY if rehearse else SIZES
        self.streams = (1, 4) if rehearse else (1, 8, 64, 256)
        self.prompt, self.made = (16, 4) if rehearse else (512, 128)
        self.figures: dict[str, Any] = {}

    def clock(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def found(self, name: str, figures: Any) -> None:
        """Print and keep it at once: the machine may be gone before the end."""
        self.figures[name] = figures
        print(json.dumps({name: figures}), flush=True)
        (self.out / "figures.json").write_text(json.dumps(self.figures, indent=1))

    def seconds(self, call: Callable[[], Any], *, times: int = 10) -> float:
        """Of one call."""
        call()
        began = self.clock()
        for _ in range(times):
            call()
        return (self.clock() - began) / times

    def folder(self) -> Path:
        """The model with random weights."""
        made = self.out / "model"
        if not made.exists():
            torch.manual_seed(0)
            with self.device:
                LlamaForCausalLM(LlamaConfig(**self.sizes)).bfloat16().save_pretrained(made)
        return made


def probe(bench: Bench) -> None:
    """Whether rows of products keep their bits in any company, by shape and number format."""
    hidden, inner = bench.sizes["hidden_size"], bench.sizes["intermediate_size"]
    shapes = [(hidden, hidden), (2 * inner, hidden), (hidden, inner)]
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for shape in shapes:
            way = way_for(torch.randn(shape, device=bench.device).to(dtype))
            found[f"{dtype} {shape[0]} x {shape[1]}"] = {
                "proven": way.proven,
                "rows padded to": way.multiple,
            }
    bench.found("probe", found)


def certificate(bench: Bench, model: Path | None) -> None:
    """`shoal parity --serve` of a real model on the device."""
    if model is None:
        return
    found = {}
    for precision in ("float32", "bfloat16"):
        settings = serve_settings([f"device={bench.device.type}", f"precision={precision}"])
        number = 4 if bench.rehearse else 50
        made = certify_folder(model, settings=settings, num_requests=number, say=print)
        found[precision] = made.to_json()
    bench.found("certificate", found)


def speed(bench: Bench) -> None:
    """Made tokens per second, and over those of `generate` and continuous batching."""
    folder = bench.folder()
    theirs = read_model(folder, auto_class="AutoModelForCausalLM", kernel="sdpa")
    theirs = theirs.to(bench.device, torch.bfloat16)
    found = {}
    for exact in (True, False):
        model = load(folder, precision="bfloat16", device=bench.device)
        most = max(bench.streams) * -(-(bench.prompt + bench.made) // 64) + 2
        runner = Runner(model, num_blocks=most, exact=exact)
        for count in bench.streams:
            prompts = prompts_of(count, length=bench.prompt, vocabulary=bench.sizes["vocab_size"])
            ours = partial(served, runner, prompts, tokens=bench.made, clock=bench.clock)
            own = partial(generated, theirs, prompts, tokens=bench.made, clock=bench.clock)
            turns = [(ours(), own()) for _ in range(3)][1:]
            row = {
                "tokens/s": count * bench.made / statistics.median(a for a, _ in turns),
                "ratio to generate": statistics.median(b / a for a, b in turns),
            }
            if not bench.rehearse:
                batched = continuous(theirs, prompts, tokens=bench.made, clock=bench.clock)
                row["ratio to continuous batching"] = batched / turns[-1][0]
            found[f"{'exact' if exact else 'plain'}, {count} streams"] = row
            bench.found("speed", found)
        held = sum(
            each.nbytes for c in (runner.cache.keys, runner.cache.values) for each in c.values()
        )
        bench.found("cache", {"bytes": held, "reckoned": most * 64 * runner.sizes.token_bytes})
        del runner, model


def products(bench: Bench) -> None:
    """int8 rows and weights, and 2:4 zeros, beside bfloat16, by rows."""
    hidden, inner = bench.sizes["hidden_size"], bench.sizes["intermediate_size"]
    weight = torch.randn(inner, hidden, device=bench.device, dtype=torch.bfloat16)
    zeros = torch.tensor([1, 1, 0, 0], dtype=torch.bfloat16, device=bench.device)
    pruned = (weight.view(inner, -1, 4) * zeros).view(inner, hidden)
    found = {}
    for rows in (32, 256):
        x = torch.randn(rows, hidden, device=bench.device, dtype=torch.bfloat16)
        dense = bench.seconds(partial(torch.nn.functional.linear, x, weight))
        codes = x.round().to(torch.int8), weight.round().to(torch.int8).t()
        row = {"bfloat16 us": 1e6 * dense}
        row["int8 / bfloat16"] = dense / bench.seconds(partial(torch._int_mm, *codes))
        if bench.device.type == "cuda":
            row["2:4 / bfloat16"] = dense / bench.seconds(_sparse(x, pruned))
        found[f"{rows} rows of {inner} x {hidden}"] = row
    bench.found("products", found)


def _sparse(x: Tensor, pruned: Tensor) -> Callable[[], Tensor]:
    weight = torch.sparse.to_sparse_semi_structured(pruned)
    return lambda: torch.nn.functional.linear(x, weight)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, help="for the certificate: a run or a model folder")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with small sizes")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(given.out, rehearse=given.rehearse)
    failed = 0
    parts = (probe, products, speed, partial(certificate, model=given.model))
    for part in parts:
        try:
            part(bench)
        except Exception as error:  # the other parts are still wanted
            failed += 1
            print(f"{part}: {type(error).__name__}: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
