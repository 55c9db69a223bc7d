"""What eager torch under autocast keeps for its backward: shoal's own activations, exactly."""

from __future__ import annotations

from shoal.legal import ModelFacts

_CHUNK_BYTES = {True: 8 * 2**20, False: 512 * 2**20}
"""Of float32 logits of one chunk of tokens, on a CPU or not (tasks/losses.py)."""
_KEPT_BYTES = 64 * 2**20  # models/cpu_attention.py: probabilities that one layer may keep
_FLOAT32_TOKENS = 512  # the same: shorter float32 rows take the fused kernel


def eager_bytes(
    facts: ModelFacts,
    *,
    rows: int,
    sequence_tokens: int,
    tensor: int = 1,
    recompute: str = "none",
    experts: bool = False,
    width: float = 2.0,
    on_cpu: bool = False,
) -> float:
    """Bytes that one token leaves in one block for the backward pass, on one device.

    `rows` of `sequence_tokens` tokens in a micro batch; `width`: bytes of an input of a product.
    A norm keeps the float32 residual it reads; an RMS norm, made of single operations, also its
    scaled value. Of its result each product keeps a cast copy, or all of them the one float32
    tensor. Queries, keys, values and the output of attention are of the width; so are the gate,
    its activation, the other half and their product, or the steps of a plain activation.
    Counted against autograd's own tensors (tests/unit/plan/test_plan_memory.py).
    """
    if recompute == "full":
        return 4.0 * facts.hidden
    residual = 8.0 if facts.gated else 4.0
    copies = width * (5 if facts.gated else 2) if width < 4 else 8.0
    hidden = (2 * residual + copies) * facts.hidden
    inner = facts.feed_forward
    if experts:
        inner = facts.experts_per_token * facts.expert_feed_forward + facts.shared_feed_forward
        hidden += 2 * width * facts.experts_per_token * facts.hidden
    sizes = facts.head_size + facts.value_head_size
    kept = (facts.heads + facts.key_value_heads) * sizes
    kept += (4 if facts.gated else facts.activation_copies) * inner
    scores = 0.0
    if on_cpu and recompute == "none":
        scores = _cpu_scores(facts, rows=rows, sequence_tokens=sequence_tokens, width=width)
    return hidden + (width * kept + scores) / tensor


def _cpu_scores(facts: ModelFacts, *, rows: int, sequence_tokens: int, width: float) -> float:
    """Probabilities that attention in blocks keeps, or the float32 mask of the fused kernel."""
    kept = rows * facts.heads * sequence_tokens**2 * width
    in_blocks = width < 4 or sequence_tokens >= _FLOAT32_TOKENS
    if in_blocks and kept <= _KEPT_BYTES:
        seen = sequence_tokens / 2 + 32 if facts.causal else sequence_tokens
        return facts.heads * width * seen
    return 4.0 * sequence_tokens + 4.0 * facts.heads


def loss_bytes(
    facts: ModelFacts,
    *,
    tokens: float,
    tensor: int = 1,
    width: float = 2.0,
    on_cpu: bool = False,
) -> float:
    """Live bytes of a micro batch outside its blocks, at the loss.

    The last norm, rotations and ids; logits and probabilities of one chunk of tokens; and the
    gradients, which the loss makes in its forward (tasks/losses.py): of the hidden states, and
    of the head: the newest, the sum, and what it was made from.
    """
    columns = facts.vocabulary / tensor
    chunk = max(64.0, _CHUNK_BYTES[on_cpu] // (4 * facts.vocabulary) // 64 * 64)
    once = min(tokens, chunk)
    head = (3 if tokens > chunk else 1) * 4.0 * columns * facts.hidden
    last = (16.0 if facts.gated else 12.0) + (width if width < 4 else 0.0)
    beside = (8.0 * facts.head_size if facts.gated else 0.0) + 40.0
    # Logits, their float32 copy where they are narrower, and probabilities.
    chunks = (8.0 if width == 4 else width + 8.0) * once * columns
    return chunks + head + (last * facts.hidden + beside) * tokens
