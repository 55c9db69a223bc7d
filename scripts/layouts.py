"""Writes docs/guide/layouts.md: what each model family can be cut along, from shoal.legal.

python scripts/layouts.py           write
python scripts/layouts.py --check   exit 1 when the page is not current
"""

from __future__ import annotations

import json
import sys

from transformers import CONFIG_MAPPING

from pages import ROOT, write_or_check
from shoal.legal import (
    Combination,
    ModelFacts,
    axes_of,
    facts_from_config,
    family_of,
    not_yet,
    of_two,
)
from shoal.legal import tensor_degrees as degrees_of
from shoal.legal.families.table import known_families

PAGE = ROOT / "docs" / "guide" / "layouts.md"
AXES = ("replicate", "shard", "context", "tensor", "pipeline", "expert")
READ_THROUGH = {"gemma3": "gemma3_text"}
"""Families that are read through a part of their file."""

HEAD = """\
# Layouts: what each family can be cut along

Written by `scripts/layouts.py` from `shoal.legal`, which refuses everything else before a worker
starts. workers = replicate x shard x context x tensor x pipeline; expert divides shard x context.

"""

AFTER = """
- *yes*: runs today; the families of [parity.md](../evidence/parity.md) are proven against one
  worker, any other by `shoal parity`. *planned*: the design has it, a run with it is refused. *no*:
  the family cannot be cut that way.
- **replicate** and **shard** take any family, also one that is not in this table, and any degree up
  to the number of samples in a batch. What is smaller than the degree lies on some ranks only.
- **tensor** takes degrees that divide the query heads, the key-value heads and the feed-forward
  width, so that every rank has whole heads. The vocabulary need not be divisible. The last column
  gives those degrees for the published model whose sizes are transformers' defaults. Of a mixture
  of experts every expert is cut by its inner width, as the shared ones are.
- **context** takes decoders and tasks whose loss is a sum over tokens; rows of a multiple of 2 x
  degree tokens (`ring`), or of the degree (`ulysses`), which also takes degrees only that, times
  tensor, divide the query heads and the key-value heads. [context.md](../design/context.md) says
  how it works and when to take which.
- **expert** takes degrees that divide the number of experts and shard x context; it is no factor of
  the workers. Each rank has its part of the experts of every block, and tokens go where theirs are
  ([experts.md](../design/experts.md)).
- **pipeline** divides the blocks into stages, at most as many as there are blocks: one on each rank
  (gpipe, 1f1b), or several (interleaved and zero-bubble schedules). A step needs as many micro
  batches as there are ranks, with some schedules a multiple of that. Stages get equal work, or the
  blocks that `split` gives them. How, and what it goes with: [pipeline.md](../design/pipeline.md).
- Fused projections (GPT-2 `c_attn`, Phi-3 `qkv_proj` and `gate_up_proj`) are cut piece by piece and
  stay fused: a rank's queries, keys and values lie next to one another, and checkpoints see boxes
  of the whole.

## What shard cuts

P parameters, E of them outside blocks (embeddings, last norm, head), B in the largest block, S
ranks along shard; optimizer state of two moments; all in float32. Bytes per rank, activations
apart (tensor divides P, E and B first):

| `level` | kept | gathered in forward and backward | gradients before they are scattered |
| --- | --- | --- | --- |
| `parameters` | 16P/S | 4E, and 4B each for a block, the next one and the message | 4E + 4B |
| `gradients` | 16P/S | 4P, and 4B for the message | 4E + 4B |
| `optimizer` | 16P/S | 4P, and 4B for the message | 4P |

`parameters` gathers every block in forward and again in backward; `gradients` once per micro batch;
both scatter gradients once per micro batch. `optimizer` scatters once per step: least traffic, most
memory. tests/parity/test_strategies_memory.py measures these figures. All reductions are sums:
the loss is divided by the step's targets beforehand.
"""


def page() -> str:
    """The whole page."""
    lines = [f"| family | {' | '.join(AXES)} | tensor degrees of its defaults |"]
    lines.append("| --- " * (len(AXES) + 2) + "|")
    for family in known_families():
        cells = [_cell(family, axis) for axis in AXES]
        lines.append(f"| {family} | {' | '.join(cells)} | {_degrees(family)} |")
    return HEAD + "\n".join(lines) + "\n" + AFTER


def _cell(family: str, axis: str) -> str:
    name = READ_THROUGH.get(family, family)
    if axis not in axes_of(family):
        return "no"
    return "planned" if not_yet(Combination(layout=of_two(axis), family=name)) else "yes"


def _facts(name: str) -> ModelFacts:
    """Of transformers' default sizes, with a number of experts where it leaves that open."""
    tree = json.loads(CONFIG_MAPPING[name]().to_json_string(use_diff=False))
    return facts_from_config({**tree, "num_experts_per_tok": tree.get("num_experts_per_tok") or 6})


def _degrees(family: str) -> str:
    """Tensor degrees of transformers' default sizes, with the sizes they come from."""
    name = READ_THROUGH.get(family, family)
    if family_of(name).tensor is None:
        return "-"
    facts = _facts(name)
    degrees = ", ".join(map(str, degrees_of(facts)))
    return (
        f"{degrees} ({facts.heads} heads, {facts.key_value_heads} key-value heads, "
        f"width {facts.feed_forward})"
    )


if __name__ == "__main__":
    sys.exit(write_or_check({PAGE: page()}, script="layouts"))
