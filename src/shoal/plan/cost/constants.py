"""The physical constants of the cost model, each with its meaning and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Numbers between a data sheet and a running program. Shares are of the rate they scale."""

    # Share of the best matrix rate that a training run sustains: clocks fall under the power
    # limit when every product is large and inputs are not zeros.
    sustained_volta: float = 0.95
    sustained_ampere: float = 0.92
    sustained_hopper: float = 0.88
    sustained_blackwell: float = 0.84
    sustained_other: float = 0.88
    sustained_fp8: float = 0.95
    # Time of a 128 x 256 tile beside its multiplications: filling the first stages of the copy
    # pipeline and writing the result (some hundred nanoseconds of memory latency each).
    tile_seconds: float = 8.5e-7
    # Share of the loss by unfilled last waves of 128 x 256 tiles that remains with split-K and
    # persistent kernels.
    wave_loss: float = 0.95
    # Share of the memory rate that streaming kernels reach.
    memory_share: float = 0.85
    # Extra traffic of casting inputs to 8 or 4 bits, bytes per element and product.
    cast_bytes: float = 2.6
    # The same for 4 bits: blocks of 16 with scales, rotations and random rounding (2509.25149).
    narrow_cast_bytes: float = 16.0
    # Row length at which a fused attention kernel reaches half of its rate.
    half_row: float = 690.0
    # Speed of FlashAttention-1 over 2 (arXiv 2307.08691: 2 is 1.7 to 3 times faster), and of a
    # kernel made for Hopper or newer over 2 there (arXiv 2407.08608: 1.5 to 2.0 times).
    first_attention: float = 0.55
    modern_attention: float = 1.8
    # Bytes per score of attention that stores them, forward and backward together
    # (write, mask, softmax, dropout, read for the product, and their gradients).
    score_bytes: float = 24.0
    # Share of link rates that large messages reach (ring, both directions busy).
    link_share: float = 0.7
    network_share: float = 0.69
    # Latency: of a collective, of each hop in a node and of each hop between nodes.
    collective_seconds: float = 20e-6
    link_hop_seconds: float = 1.5e-6
    network_hop_seconds: float = 60e-6
    # The same over EFA and plain Ethernet: chunks of megabytes fill the ring hop by hop.
    cloud_hop_seconds: float = 500e-6
    # How much compute slows while a collective runs beside it (shared memory and processors).
    contention: float = 0.12
    # Bytes per parameter that the update reads and writes, fused and not.
    update_bytes: float = 32.0
    eager_update_bytes: float = 60.0
    # Memory beside the allocator: CUDA context and communication buffers, bytes.
    context_bytes: float = 1.2e9
    # Share by which reserved memory exceeds live tensors (fragmentation, rounding).
    reserve_share: float = 0.08


DEFAULT = Constants()
