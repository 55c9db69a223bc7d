"""Experts over two workers: shoal beside transformers' own expert parallel, and beside one worker.

    python benchmarks/expert.py [--pairs 7] [--steps 6]

The same Mixtral (8 experts, 2 of each token), rows and micro batches in float32 on 2 cores; FSDP2
for everything but the experts in both. Interleaved runs, median ratios of step time; above 1 shoal
is faster. Mark: >= 0.95.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from peers import ENVIRONMENT, interval, quickstart_rows, run, shoal_command, torchrun

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
}
SETTINGS = ", ".join(f"{key}: {value}" for key, value in SIZES.items())
MODEL = f"model={{kind: config, architecture: mixtral, {SETTINGS}}}"
LAYOUTS = {
    "shard 2, expert 2": "parallel={shard: 2, expert: 2}",
    "shard 2": "parallel={shard: 2}",
    "one worker": "parallel={replicate: 1}",
}


def save_model(folder: Path, vocabulary: int) -> None:
    """A folder of the same sizes, with transformers' own first weights."""
    from transformers import MixtralConfig, MixtralForCausalLM

    MixtralForCausalLM(MixtralConfig(**SIZES, vocab_size=vocabulary)).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--micro", type=int, default=4)
    given = parser.parse_args()
    ENVIRONMENT["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        tokens, config = quickstart_rows(given.steps)
        np.save(scratch / "tokens.npy", tokens)
        save_model(scratch / "model", config["vocab_size"])
        words = ["--model", str(scratch / "model"), "--tokens", str(scratch / "tokens.npy")]
        peer = torchrun("baseline_expert.py", *words, "--micro", str(given.micro))

        def ours(name: str, number: int) -> float:
            out = scratch / f"{name}-{number}".replace(" ", "-")
            more = [
                MODEL,
                LAYOUTS[name],
                f"train.micro_batch_samples={given.micro}",
                "precision.compute=float32",
                "launch.workers=processes",
                "launch.threads_per_worker=1",
            ]
            return run(shoal_command(out, given.steps, *more), out=out)["step"]

        found: dict[str, list[float]] = {name: [] for name in LAYOUTS}
        for number in range(-1, given.pairs):  # the first round warms caches and is not counted
            first = run(peer, out=None)["step"] if number % 2 else None
            seconds = {name: ours(name, number) for name in LAYOUTS}
            theirs = first if first is not None else run(peer, out=None)["step"]
            shown = ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items())
            print(f"round {number}: peer {theirs:.3f} s, {shown}", file=sys.stderr, flush=True)
            if number >= 0:
                for name, value in seconds.items():
                    found[name].append(theirs / value)
    print("| shoal | beside transformers' expert parallel | 90 % interval |\n| --- | ---: | --- |")
    for name, ratios in found.items():
        low, high = interval(ratios)
        print(f"| {name} | {statistics.median(ratios):.3f} | {low:.3f} to {high:.3f} |")


if __name__ == "__main__":
    main()
