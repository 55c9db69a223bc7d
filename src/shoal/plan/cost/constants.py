"""The physical constants of the cost model, each with its meaning and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Numbers between a data sheet and a running program. Shares are of the rate they scale."""

    # Share of the best matrix rate that a training run sustains: clocks fall under the power
    # limit when every product is large and inputs are not zeros.
    sustained_volta: float = 0.9
    sustained_ampere: float = 0.95
    sustained_hopper: float = 0.85
    sustained_blackwell: float = 0.85
    sustained_other: float = 0.85
    sustained_fp8: float = 0.85
    # Depth of a product (its reduced dimension) at which half of the rate is reached: the
    # prologue and epilogue of a tile.
    half_depth: float = 150.0
    # Share of the loss by unfilled last waves of 128 x 256 tiles that remains with split-K and
    # persistent kernels.
    wave_loss: float = 0.5
    # Share of the memory rate that streaming kernels reach.
    memory_share: float = 0.85
    # Memory traffic of unfused (eager, autocast) elementwise work over fused.
    eager_traffic: float = 2.0
    # Extra traffic of casting inputs to 8 or 4 bits, bytes per element and product.
    cast_bytes: float = 4.0
    # Row length at which a fused attention kernel reaches half of its rate.
    half_row: float = 500.0
    # Speed of a kernel made for Hopper or newer over FlashAttention-2 there
    # (arXiv 2407.08608: 1.5 to 2.0 times forward, 1.5 to 1.75 backward).
    modern_attention: float = 1.6
    # Bytes per score of attention that stores them, forward and backward together
    # (write, mask, softmax, dropout, read for the product, and their gradients).
    score_bytes: float = 30.0
    # Kernels per block in the forward pass, one after the other from Python.
    eager_launches: float = 45.0
    fused_launches: float = 20.0
    # Host time per kernel.
    launch_seconds: float = 6e-6
    # Share of link rates that large messages reach (ring, both directions busy).
    link_share: float = 0.75
    network_share: float = 0.75
    # Latency: of a collective, of each hop in a node and of each hop between nodes.
    collective_seconds: float = 20e-6
    link_hop_seconds: float = 1.5e-6
    network_hop_seconds: float = 15e-6
    # How much compute slows while a collective runs beside it (shared memory and processors).
    contention: float = 0.1
    # Bytes per parameter that the update reads and writes, fused and not.
    update_bytes: float = 32.0
    eager_update_bytes: float = 60.0
    # Traffic per logit of the loss, forward and backward.
    logit_traffic: float = 30.0
    # Fixed host time per optimizer step: data, logging, synchronisation.
    step_seconds: float = 0.01
    # Memory beside the allocator: CUDA context and communication buffers, bytes.
    context_bytes: float = 1.2e9
    # Share by which reserved memory exceeds live tensors (fragmentation, rounding).
    reserve_share: float = 0.08


DEFAULT = Constants()
