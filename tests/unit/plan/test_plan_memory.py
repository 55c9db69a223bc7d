"""The activations that the planner counts are those that autograd keeps, storage by storage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.layout import Layout
from shoal.legal import facts_from_config
from shoal.models import init
from shoal.models.anatomy import anatomy_of
from shoal.models.huggingface import build_meta, config_from
from shoal.observe.memory import LiveStorage
from shoal.parallel.precision import DTYPES, compute_context
from shoal.plan.cost.eager import eager_bytes, loss_bytes
from shoal.plan.cost.memory import memory_on_cpu
from shoal.plan.workload import FORMATS, Candidate, Workload
from shoal.tasks.kinds import create

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_positions": 1024, "vocab_size": 2048}

MIXTRAL = {
    **LLAMA,
    "model_type": "mixtral",
    "intermediate_size": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def peak_bytes(config: dict[str, Any], compute: str, *, rows: int, tokens: int) -> int:
    """Peak of live storage of both passes, parameters and gradients not counted."""
    task = create("causal-lm")
    model = build_meta(config_from(config), auto_class=task.auto_class, dropout="off")
    init.materialise(model, record=init.record(model), seed=0)
    anatomy, resident = anatomy_of(model), list(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        resident.append(parameter.grad)
    ids = torch.arange(rows * tokens).view(rows, tokens) * 7919 % config["vocab_size"]
    four = torch.arange(tokens) * 4 // tokens  # packed documents
    batch = {
        "input_ids": ids,
        "labels": ids.roll(-1, dims=1),
        "position_ids": (torch.arange(tokens) % (tokens // 4)).expand(rows, tokens).contiguous(),
        "document_ids": four.expand(rows, tokens).contiguous(),
        "sample_ids": torch.arange(rows),
    }

    def step() -> None:
        with compute_context(DTYPES[compute], device=torch.device("cpu")):
            loss = task.output(model, anatomy, batch, step=0).total()
        loss.backward()

    step()  # what is made once is made
    with LiveStorage.above(resident) as live:
        step()
    return live.peak_bytes - sum(tensor.nbytes for tensor in resident)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("config", "rows", "tokens"), [(LLAMA, 4, 64), (LLAMA, 1, 512), (GPT2, 4, 64), (MIXTRAL, 4, 64)]
)
def test_activations_of_a_block_and_of_the_loss(
    config: dict[str, Any], rows: int, tokens: int, compute: str
) -> None:
    """A block to 1 %: what is left out are a few numbers per token (of experts, whose order and
    weights are 90 bytes of 6,700 here, to 2 %). The rest of a micro batch to
    10 %: buffers that live for a moment while the loss is made, and the mask."""
    depth = "n_layer" if config is GPT2 else "num_hidden_layers"
    torch.manual_seed(0)
    one, three = (
        peak_bytes({**config, depth: count}, compute, rows=rows, tokens=tokens) for count in (1, 3)
    )
    block = (three - one) / 2
    facts = facts_from_config({**config, depth: 1})
    width = 4.0 if FORMATS[compute] == "fp32" else 2.0
    each = eager_bytes(
        facts,
        rows=rows,
        sequence_tokens=tokens,
        width=width,
        on_cpu=True,
        experts=bool(facts.experts),
    )
    casts = 2.0 * facts.block_parameters if width < 4 else 0.0
    assert rows * tokens * each + casts == pytest.approx(block, rel=0.02 if facts.experts else 0.01)
    rest = loss_bytes(facts, tokens=rows * tokens, width=width, on_cpu=True)
    rest += 2.0 * facts.vocabulary * facts.hidden if width < 4 else 0.0
    assert rest == pytest.approx(one - block, rel=0.1)


def test_experts_over_ranks_leave_as_much_as_parts_of_each_would() -> None:
    """What lies on a rank is the same; only what is gathered is less (docs/design/experts.md)."""
    facts = facts_from_config({**MIXTRAL, "num_hidden_layers": 4})
    workload = Workload(facts=facts, sequence_tokens=64, global_batch_samples=8, precision="fp32")
    routed = 4 * 4 * facts.expert_parameters

    def kept(level: str, expert: int) -> tuple[float, float]:
        layout = Layout(shard=2, expert=expert)
        candidate = Candidate(layout=layout, micro_batch_samples=1, level=level)
        memory = memory_on_cpu(candidate, workload=workload)
        return memory.weights, memory.optimizer

    assert kept("parameters", 2) == kept("parameters", 1)
    (own, states), (every, same) = kept("optimizer", 2), kept("optimizer", 1)
    assert states == same and every - own == pytest.approx(4 * routed / 2)
