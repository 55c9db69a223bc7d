"""Plans for well-known runs, kept as text: a change of the model shows as a change of a plan.

To accept a change on purpose: `python tests/unit/plan/test_plan_golden.py` writes the file anew.
"""

from __future__ import annotations

from pathlib import Path

from planner_score.profiles import MEGATRON
from shoal.legal import facts_from_config
from shoal.plan.cost.step import Estimator
from shoal.plan.explain import choices
from shoal.plan.hardware import parse_cluster
from shoal.plan.search import Space, find
from shoal.plan.software import SHOAL
from shoal.plan.workload import Workload

GOLDEN = Path(__file__).parents[2] / "golden" / "plans.txt"
LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8}
SIZES = {
    "1B": (2048, 16, 32, 8192),
    "8B": (4096, 32, 32, 14336),
    "70B": (8192, 80, 64, 28672),
    "405B": (16384, 126, 128, 53248),
}
RUNS = [
    ("1B", "H100", 4096, 64, SHOAL),
    ("1B", "2x4xRTX4090, 10Gbit/node", 2048, 64, SHOAL),
    ("8B", "8xA100", 8192, 128, SHOAL),
    ("8B", "16x8xH100", 8192, 512, SHOAL),
    ("70B", "8x8xH100", 8192, 512, SHOAL),
    ("70B", "64x8xH100", 8192, 1024, MEGATRON),
    ("405B", "512x8xH100", 8192, 2048, MEGATRON),
]


def plans() -> str:
    """One line per run: what is planned, with time to two digits and memory to one GiB."""
    lines = []
    for size, cluster, row, batch, software in RUNS:
        hidden, layers, heads, inner = SIZES[size]
        facts = facts_from_config(
            {
                **LLAMA,
                "hidden_size": hidden,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "intermediate_size": inner,
                "tie_word_embeddings": size == "1B",
            }
        )
        workload = Workload(facts=facts, sequence_tokens=row, global_batch_samples=batch)
        space = Space(runnable=software is SHOAL)
        best = find(Estimator(workload, parse_cluster(cluster), software), space=space).best
        lines.append(
            f"{size} on {cluster} ({batch} x {row}, {software.name}): {choices(best.candidate)}: "
            f"{best.step_seconds:.2g} s, {best.peak.total / 2**30:.0f} GiB"
        )
    return "\n".join(lines) + "\n"


def test_plans_are_as_before() -> None:
    assert plans() == GOLDEN.read_text()


if __name__ == "__main__":
    GOLDEN.write_text(plans())
