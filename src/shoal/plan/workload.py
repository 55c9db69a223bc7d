"""What is to be computed: the work of a step, the ways to cut it, and their FLOPs."""

from __future__ import annotations

from dataclasses import dataclass, fields

from shoal.layout import Layout
from shoal.legal import SCHEDULES as SCHEDULES
from shoal.legal import ModelFacts

RECOMPUTE = ("none", "selective", "full")
LEVELS = ("optimizer", "gradients", "parameters")
DEGREES = tuple(each.name for each in fields(Layout))
"""The axes of a layout by name."""
FORMATS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""The planner's short words for a recipe's number formats."""


WIDER = {
    "fp4": ("fp4", "fp8", "bf16", "fp16", "fp32"),
    "fp8": ("fp8", "bf16", "fp16", "fp32"),
    "bf16": ("bf16", "fp16", "fp32"),
    "fp16": ("fp16", "bf16", "fp32"),
    "fp32": ("fp32",),
}
"""Each number format, and those that may stand in for it, the nearest first."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One optimizer step: `global_batch_samples` rows of `sequence_tokens` tokens.

    `precision` is the number format of the matrix products: fp32, bf16, fp16, fp8 or fp4.
    `trainable` is `"all"`, or `"adapters"` when only low-rank additions get gradients;
    `base_bytes`: bytes of an element of the blocks' matrices beside them, if fewer than a float's.
    """

    facts: ModelFacts
    sequence_tokens: int
    global_batch_samples: int
    precision: str = "bf16"
    trainable: str = "all"
    base_bytes: float | None = None

    @property
    def tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.sequence_tokens * self.global_batch_samples


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run a workload: a layout and everything else that decides time and memory.

     `recompute_share` of the blocks are recomputed. `level` says what the shard axis splits
    : optimizer state only, gradients too, or parameters too. `chunks` is the number of
     stages per rank of a looped or V schedule.
    """

    layout: Layout
    micro_batch_samples: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    recompute: str = "none"
    recompute_share: float = 1.0
    level: str = "parameters"
    policy: str = "every-step"
    every_steps: int = 1
    codec: str = "none"

    @property
    def state_split(self) -> int:
        """Ranks that the shard axis splits states over: those of context hold the same weights."""
        return self.layout.shard * self.layout.context if self.layout.shard > 1 else 1

    def micro_batches(self, workload: Workload) -> int:
        """Micro batches per replica and step, rounded up."""
        share = self.layout.replicate * self.layout.shard * self.micro_batch_samples
        return max(1, -(-workload.global_batch_samples // share))


def attended_tokens(facts: ModelFacts, *, sequence_tokens: int, halved: bool) -> float:
    """Mean number of keys one query meets, over the blocks of the model.

    With `halved`, half of the row for causal attention (what a kernel that skips the masked half
    computes); without, the whole row (the convention of PaLM's appendix B, arXiv 2204.02311).
    """
    full = sequence_tokens / 2 if facts.causal and halved else float(sequence_tokens)
    if not facts.window_layers:
        return full
    near = min(full, float(facts.window)) if halved else min(sequence_tokens, facts.window)
    share = facts.window_layers / facts.layers
    return share * near + (1 - share) * full


def flops_per_token(facts: ModelFacts, *, sequence_tokens: int, attention: str = "full") -> float:
    """Model FLOPs per trained token, forward and backward, without recompute.

    6 per active parameter that is in a matrix product (the input embedding is a lookup, unless it
    is also the head), plus attention: 6 x heads x (query-key + value size) x keys met, with
    `attention="full"` counting every key and `"causal"` only those that are not masked.
    """
    matrices = facts.active_parameters
    if not facts.tied:
        matrices -= facts.embedding_parameters
    keys = attended_tokens(facts, sequence_tokens=sequence_tokens, halved=attention == "causal")
    per_key = 6 * facts.heads * (facts.head_size + facts.value_head_size)
    return 6.0 * matrices + (facts.layers + facts.cross_layers) * per_key * keys


def stage_blocks(
    facts: ModelFacts, *, stages: int, sequence_tokens: int, balanced: bool = False
) -> list[int]:
    """Blocks of each stage; `balanced` counts the head as the blocks that cost as much.

    Without it the blocks are spread evenly and the first stages take what is left over.
    """
    if stages == 1:
        return [facts.layers]
    if not balanced:
        even, left = divmod(facts.layers, stages)
        return [even + (at < left) for at in range(stages)]
    # Cost of the head in blocks, by parameters in matrix products; a stage is closed as soon as
    # its share of the total is reached (the rule that nanotron uses).
    head = facts.vocabulary * facts.hidden / max(1.0, facts.block_parameters)
    share = (facts.layers + head) / stages
    counts, reached = [0] * stages, 0.0
    at = 0
    for _ in range(facts.layers):
        counts[at] += 1
        reached += 1
        if reached >= share * (at + 1) and at < stages - 1:
            at += 1
    return counts
