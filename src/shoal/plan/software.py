"""Training software as the cost model sees it: what is fused, what overlaps, what is kept.

Other programs' profiles stand in benchmarks/planner_score/profiles.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Software:
    """What a training program does between the matrix products. Bytes are per parameter."""

    name: str
    fused: bool = False
    """Norms, activations and rotations are single kernels."""
    flash: bool = True
    """Attention never stores its scores."""
    attention_version: int = 2
    """1, 2 or 3 as FlashAttention counts; 3 for any kernel made for Hopper or newer."""
    elementwise: float = 2.0
    """Memory traffic of norms, activations and rotations over that of fused kernels."""
    logit_traffic: float = 40.0
    """Bytes per logit that the loss moves, both passes."""
    accumulate_bytes: float = 0.0
    """Traffic per parameter and micro batch of adding up gradients."""
    sequence_parallel: bool = True
    """The tensor axis also splits what lies between its products."""
    block_host_seconds: float = 1.0e-3
    """What the host needs to launch one block, both passes, without collectives."""
    collective_host_seconds: float = 50e-6
    """The same for one collective."""
    collective_rank_seconds: float = 0.0
    """What a collective costs the host more per rank of the tensor axis."""
    send_host_seconds: float = 100e-6
    """What the host needs for one message to another stage."""
    step_host_seconds: float = 0.01
    """Per step: data, logging."""
    bucket_bytes: float = 100e6
    """Gradients are reduced in pieces of this size."""
    overlap_tensor: float = 0.0
    """Share of the tensor axis's communication that is hidden."""
    overlap_gradients: float = 0.5
    """Share of the backward behind which the reduction of gradients can hide."""
    overlap_shard: float = 0.8
    """Share of compute behind which fetching sharded parameters can hide."""
    overlap_sends: float = 0.0
    """Share of compute behind which messages between stages can hide."""
    gathers_per_block: float = 1.0
    """Pieces in which the sharded parameters of a block are fetched."""
    weight_bytes: float = 2.0
    """Weights in the compute format."""
    master_bytes: float = 4.0
    """The copy that the optimizer updates; 0: the weights are that copy."""
    moment_bytes: float = 8.0
    """The optimizer's state."""
    gradient_bytes: float = 4.0
    """The accumulated gradient."""
    reduce_bytes: float = 4.0
    """The gradient as it is reduced."""
    transient_bytes: float = 0.0
    """Alive beside them in the update."""
    padding_parameters: float = 0.0
    """Parameters by which flat buffers are padded."""
    logit_bytes: float = 10.0
    """Memory per logit at the peak of the loss."""
    unsplit_bytes: float = 0.0
    """Activations per hidden element and block that the tensor axis does not split."""
    keeps_gathers: bool = False
    """Two gather buffers of the tensor axis stay allocated."""
    regather_bytes: float = 0.0
    """The gathered copy after a sharded update."""
    balanced_stages: bool = False
    """Stages are cut by compute cost, not by number of blocks."""
    dropout: bool = False
    """Dropout is on, and keeps its masks."""
    recomputes_gate: bool = False
    """The product of a gated activation is made again in the backward."""
    selective_share: float = 0.0
    """Part of a block's forward that selective recompute runs again, beside attention that stores
    its scores."""
    resets_peak: bool = False
    """The reported peak of live tensors is that of the update alone."""
    autocast: bool = False
    """Eager torch: weights and residuals in float32, inputs of products cast, the loss in
    chunks."""
    on_cpu: bool = False
    """With the attention of models/cpu_attention.py."""

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
