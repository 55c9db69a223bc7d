"""Training software as the cost model sees it: what is fused, what overlaps, what is kept."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Software:
    """What a training program does between the matrix products.

    `fused`: norms, activations and rotations are single kernels. `flash`: attention never stores
    its scores; `attention_version`: 1, 2 or 3 as FlashAttention counts, 3 for any kernel made for
    Hopper or newer. `elementwise`: memory traffic of norms, activations and rotations over that of
    fused kernels; `logit_traffic`: bytes per logit of the loss, both passes; `accumulate_bytes`:
    traffic per parameter and micro batch of adding up gradients.

    `block_host_seconds`: what the host needs to launch one block, both passes, without
    collectives; `collective_host_seconds` and `send_host_seconds` for one of those, plus
    `collective_rank_seconds` per rank of the tensor axis;
    `step_host_seconds` per step (data, logging). `bucket_bytes`: gradients are reduced in pieces
    of this size; sharded parameters are fetched in `gathers_per_block`. `overlap_*`: share of
    compute behind which that communication can hide (tensor: share of it that is hidden).

    Bytes are per parameter: `weight_bytes` in compute format, `master_bytes` of the copy that the
    optimizer updates (0: the weights are that copy), `moment_bytes` of its state, `gradient_bytes`
    of the accumulated gradient, `transient_bytes` alive beside them in the update, `regather_bytes`
    of the gathered copy after a sharded update. `padding_parameters`: what flat buffers are padded
    by. `logit_bytes`: memory per logit at the peak of the loss. `unsplit_bytes`: activations per
    hidden element and block that the tensor axis does not split. `keeps_gathers`: two gather
    buffers of the tensor axis stay allocated. `balanced_stages`: stages are cut by compute cost,
    not by number of blocks. `recomputes_gate`: the product of a gated activation is made again in
    the backward. `selective_share`: part of a block that selective recompute runs again, beside
    attention that stores its scores (0 where a flash kernel makes it idle). `resets_peak`: the
    reported peak of live tensors is that of the update alone. `autocast`: eager torch, weights and
    residuals in float32, inputs of products cast, the loss in chunks. `on_cpu`: with the attention
    of models/cpu_attention.py. `shares_update`: replicas share their parameters, and each updates a
    part.
    """

    name: str
    fused: bool = False
    flash: bool = True
    attention_version: int = 2
    elementwise: float = 2.0
    logit_traffic: float = 40.0
    accumulate_bytes: float = 0.0
    sequence_parallel: bool = True
    block_host_seconds: float = 1.0e-3
    collective_host_seconds: float = 50e-6
    collective_rank_seconds: float = 0.0
    send_host_seconds: float = 100e-6
    step_host_seconds: float = 0.01
    bucket_bytes: float = 100e6
    overlap_tensor: float = 0.0
    overlap_gradients: float = 0.5
    overlap_shard: float = 0.8
    overlap_sends: float = 0.0
    gathers_per_block: float = 1.0
    weight_bytes: float = 2.0
    master_bytes: float = 4.0
    moment_bytes: float = 8.0
    gradient_bytes: float = 4.0
    reduce_bytes: float = 4.0
    transient_bytes: float = 0.0
    padding_parameters: float = 0.0
    logit_bytes: float = 10.0
    unsplit_bytes: float = 0.0
    keeps_gathers: bool = False
    regather_bytes: float = 0.0
    balanced_stages: bool = False
    dropout: bool = False
    recomputes_gate: bool = False
    selective_share: float = 0.0
    resets_peak: bool = False
    autocast: bool = False
    on_cpu: bool = False
    shares_update: bool = False

    def accumulated(self, precision: str) -> float:
        """Bytes that a micro batch moves per parameter: adding gradients up, and casts."""
        casts = 12.0 if self.autocast and precision != "fp32" else 0.0
        return self.accumulate_bytes + casts


SHOAL = Software(
    name="shoal",
    elementwise=4.8,
    accumulate_bytes=12.0,
    autocast=True,
    weight_bytes=4.0,
    master_bytes=0.0,
    overlap_shard=0.6,
    overlap_gradients=0.0,
    selective_share=0.3,
    padding_parameters=16384.0,
)
"""This project: eager torch under autocast, FSDP2 that gathers float32, chunked loss, one flat
reduction after the last backward; two regions, the last chunk of each half empty on average."""

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
PROFILES = {each.name: each for each in (SHOAL, MEGATRON, MEGATRON_CLASSIC, FSDP)}
