"""Activation memory of a long row: one worker beside four that have a quarter of it each.

    python benchmarks/long_rows.py [--tokens 16384] [--workers 4] [--packed]

`shoal train` of a small llama for two steps of one row, each way in turn. Activations are the peak
of live tensors (`peak_memory_bytes` of metrics.jsonl, the largest of all ranks) without parameters,
gradients and both moments. Mark: 0.3 on four workers. Rows are one document each, unless
`--packed`: then one worker has a mask of T x T as well, which its fused attention widens and keeps
in each layer, and a ring none.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from shoal.observe.events import read_lines

WORDS = ["river", "stone", "lamp", "winter", "garden", "bread", "window", "silver", "morning"]
RECIPE = """\
seed: 3
model: {{kind: config, architecture: llama, hidden_size: 128, intermediate_size: 384,
  num_hidden_layers: 4, num_attention_heads: 8, num_key_value_heads: 4,
  max_position_embeddings: {tokens}}}
data: {{source: {source}, sequence_tokens: {tokens}, packing: {packing},
  validation: {{fraction: 0.1}}, tokenizer: {{kind: train, vocabulary_size: 300}}}}
train: {{steps: 2, global_batch_samples: 1, micro_batch_samples: 1, evaluate_every_steps: 0}}
precision: {{compute: float32}}
launch: {{workers: processes, threads_per_worker: 1}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--packed", action="store_true", help="several documents in a row")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        draw = random.Random(0)
        length = given.tokens // 5 if given.packed else given.tokens
        lines = [" ".join(draw.choices(WORDS, k=length)) for _ in range(60)]
        source = scratch / "words.jsonl"
        source.write_text("".join(json.dumps({"text": each}) + "\n" for each in lines))
        recipe = scratch / "recipe.yaml"
        recipe.write_text(
            RECIPE.format(tokens=given.tokens, source=source, packing=str(given.packed).lower())
        )
        one = activations(recipe, "replicate: 1", out=scratch / "one")
        print(f"one worker: {one / 2**20:.0f} MiB")
        for kind in ("ring", "ulysses"):
            layout = f"context: {{degree: {given.workers}, kind: {kind}}}"
            found = activations(recipe, layout, out=scratch / kind)
            print(f"context {given.workers}, {kind}: {found / 2**20:.0f} MiB, {found / one:.3f}")


def activations(recipe: Path, layout: str, *, out: Path) -> float:
    """Bytes at the peak, beside the 16 of each parameter."""
    code = "from shoal.cli.main import main; main()"
    words = ["train", str(recipe), f"parallel={{{layout}}}", "--out", str(out)]
    subprocess.run([sys.executable, "-c", code, *words], check=True, stdout=subprocess.DEVNULL)
    rows = [row for row in read_lines(out / "metrics.jsonl") if "loss" in row]
    summary = json.loads((out / "summary.json").read_text())
    peak = max(row["peak_memory_bytes"] or 0 for row in rows)
    return float(peak - 16 * summary["parameters"])


if __name__ == "__main__":
    main()
