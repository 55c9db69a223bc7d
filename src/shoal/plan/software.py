"""Training software as the cost model sees it: what is fused, what overlaps, what is kept."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Software:
    """What a training program does between the matrix products.

    `fused`: norms, activations and rotations are single kernels. `flash`: attention never stores
    its scores. `modern_attention`: the kernel is made for Hopper or newer (FlashAttention-3,
    cuDNN). `overlap_*`: share of that communication hidden behind compute when there is enough
    of it. Bytes are per parameter: `weight_bytes` in compute format, `master_bytes` of the copy
    that the optimizer updates (0: the weights are that copy), `moment_bytes` of its state,
    `gradient_bytes` of the accumulated gradient, `transient_bytes` alive beside them in the
    update; `regather_bytes` of the gathered copy after a sharded update. `logit_bytes`: memory per
    logit at the peak of the loss. `unsplit_bytes`: activations per hidden element and block that
    the tensor axis does not split. `keeps_gathers`: two gather buffers of the tensor axis stay
    allocated. `balanced_stages`: stages are cut by compute cost, not by number of blocks.
    `resets_peak`: the reported peak of live tensors is that of the update alone.
    """

    name: str
    fused: bool = False
    flash: bool = True
    modern_attention: bool = False
    sequence_parallel: bool = True
    launches: float = 1.0
    overlap_tensor: float = 0.0
    overlap_gradients: float = 0.5
    overlap_shard: float = 0.8
    overlap_sends: float = 0.0
    weight_bytes: float = 2.0
    master_bytes: float = 4.0
    moment_bytes: float = 8.0
    gradient_bytes: float = 4.0
    reduce_bytes: float = 4.0
    transient_bytes: float = 0.0
    logit_bytes: float = 10.0
    unsplit_bytes: float = 0.0
    keeps_gathers: bool = False
    regather_bytes: float = 0.0
    balanced_stages: bool = False
    dropout: bool = False
    resets_peak: bool = False


SHOAL = Software(name="shoal", logit_bytes=2.0, overlap_shard=0.8)
"""This project: eager torch, FSDP2, chunked loss, one flat reduction after the last backward."""

NANOTRON = Software(
    name="nanotron",
    fused=False,
    transient_bytes=2.0,
    regather_bytes=2.0,
    keeps_gathers=True,
    unsplit_bytes=9.0,
    balanced_stages=True,
    resets_peak=True,
    launches=1.5,
)
MEGATRON = Software(
    name="megatron",
    fused=True,
    modern_attention=True,
    overlap_tensor=0.5,
    overlap_gradients=0.8,
    gradient_bytes=4.0,
    logit_bytes=8.0,
    balanced_stages=False,
)
MEGATRON_CLASSIC = replace(
    MEGATRON,
    name="megatron-classic",
    flash=False,
    modern_attention=False,
    sequence_parallel=False,
    overlap_tensor=0.0,
    overlap_gradients=0.0,
    reduce_bytes=2.0,
    gradient_bytes=2.0,
    dropout=True,
)
FSDP = Software(name="fsdp", fused=False)
FSDP_COMPILED = replace(FSDP, name="fsdp-compiled", fused=True)
ONEFLOW = replace(MEGATRON_CLASSIC, name="oneflow", overlap_gradients=0.5)
GPT_NEOX = replace(MEGATRON_CLASSIC, name="gpt-neox", flash=True)
GENERIC = replace(MEGATRON, name="generic", modern_attention=False, overlap_tensor=0.2)
"""For software that is not known: fused kernels, FlashAttention-2, some overlap."""
PROFILES = {
    p.name: p
    for p in (
        SHOAL,
        NANOTRON,
        MEGATRON,
        MEGATRON_CLASSIC,
        FSDP,
        FSDP_COMPILED,
        ONEFLOW,
        GPT_NEOX,
        GENERIC,
    )
}
