"""Training software that published rows ran on, as the cost model sees it.

Host times, traffic factors and overlaps are fitted to each program's own rows.
"""

from __future__ import annotations

from dataclasses import replace

from shoal.plan.software import Software

MEGATRON = Software(
    name="megatron",
    fused=True,
    elementwise=1.0,
    logit_traffic=25.0,
    attention_version=3,
    overlap_tensor=0.5,
    overlap_gradients=0.8,
    bucket_bytes=500e6,
    logit_bytes=8.0,
)
"""Megatron-Core since 2025: cuDNN attention, communication behind products."""
MEGATRON_CLASSIC = replace(
    MEGATRON,
    name="megatron-classic",
    flash=False,
    attention_version=2,
    sequence_parallel=False,
    overlap_tensor=0.0,
    overlap_gradients=0.0,
    reduce_bytes=2.0,
    gradient_bytes=2.0,
    accumulate_bytes=6.0,
    dropout=True,
)
"""Megatron-LM of 2020 to 2022: attention that stores its scores, nothing overlaps, and every micro
batch adds its 16-bit gradients to the sum (read both, write one)."""
FSDP = Software(
    name="fsdp",
    elementwise=4.8,
    overlap_shard=0.6,
    overlap_gradients=0.8,
    selective_share=0.3,
)
NANOTRON = Software(
    name="nanotron",
    elementwise=3.9,
    logit_traffic=55.0,
    accumulate_bytes=6.0,
    block_host_seconds=2.2e-3,
    collective_host_seconds=215e-6,
    bucket_bytes=460e6,
    step_host_seconds=0.037,
    overlap_gradients=0.3,
    transient_bytes=2.0,
    regather_bytes=2.0,
    keeps_gathers=True,
    unsplit_bytes=9.0,
    balanced_stages=True,
    resets_peak=True,
)
NANOTRON_EARLY = replace(
    NANOTRON,
    name="nanotron-early",
    block_host_seconds=1.8e-3,
    collective_rank_seconds=245e-6,
)
"""The same on an older stack: every collective of the tensor axis costs the host time per rank."""
NEMO_2024 = replace(MEGATRON, name="nemo-2024", attention_version=2)
DEEPSPEED_2021 = replace(
    MEGATRON_CLASSIC, name="deepspeed-2021", overlap_shard=0.0, gathers_per_block=12.0
)
"""ZeRO-3 as in arXiv 2104.04473: each parameter is fetched by itself, nothing overlaps."""
ONEFLOW = replace(MEGATRON_CLASSIC, name="oneflow", overlap_gradients=0.5)
GPT_NEOX = replace(MEGATRON_CLASSIC, name="gpt-neox", flash=True, attention_version=1)
FSDP_COMPILED = replace(FSDP, name="fsdp-compiled", fused=True, elementwise=1.1, overlap_shard=0.68)
FOUNDRY = replace(FSDP, name="foundry", attention_version=1, elementwise=1.7, logit_traffic=17.5)
"""llm-foundry: fused cross entropy and FlashAttention of the first version."""
GENERIC = replace(
    MEGATRON,
    name="generic",
    attention_version=2,
    overlap_tensor=0.2,
    elementwise=2.0,
    reduce_bytes=2.0,
)
"""For software that is not known: partly fused kernels, FlashAttention-2, some overlap."""
