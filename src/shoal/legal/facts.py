"""The sizes of a model that everything else is computed from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Sizes of a model, all in elements; the parameter counts are exact.

    `layers` counts encoder and decoder blocks together; `cross_layers` of them also attend to
    the encoder. `window` limits the attention of `window_layers` blocks to that many tokens.
    The first `dense_layers` blocks of a mixture-of-experts model have a dense feed-forward part.
    `balanced`: its configuration asks for a balance loss of experts.
    `vocabulary` is what the head gives: labels, in a classifier. `activation_copies`: tensors of
    the inner width that an ungated feed-forward part keeps for its backward in eager torch.
    `fixed_tokens`: positions of every sample where the model's sizes fix it (an image's patches).
    """

    family: str
    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_size: int
    value_head_size: int
    feed_forward: int
    vocabulary: int
    gated: bool
    activation_copies: int = 2
    causal: bool = True
    tied: bool = False
    window: int = 0
    window_layers: int = 0
    cross_layers: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_feed_forward: int = 0
    shared_feed_forward: int = 0
    dense_layers: int = 0
    balanced: bool = False
    attention_parameters: int
    feed_forward_parameters: int
    expert_parameters: int = 0
    expert_shared_parameters: int = 0
    embedding_parameters: int
    head_parameters: int = 0
    final_parameters: int = 0
    extra_parameters: int = 0
    fixed_tokens: int | None = None

    @cached_property
    def expert_layers(self) -> int:
        """Number of blocks with experts."""
        return self.layers - self.dense_layers if self.experts else 0

    @cached_property
    def block_parameters(self) -> float:
        """Parameters of one block, averaged over the blocks."""
        return self.blocks_parameters / self.layers

    @cached_property
    def blocks_parameters(self) -> int:
        """Parameters of all blocks together."""
        routed = self.expert_shared_parameters + self.experts * self.expert_parameters
        dense = (self.layers - self.expert_layers) * self.feed_forward_parameters
        attention = self.layers * self.attention_parameters
        return attention + dense + self.expert_layers * routed + self.extra_parameters

    @cached_property
    def parameters(self) -> int:
        """Stored parameters, tied ones once."""
        return (
            self.blocks_parameters
            + self.embedding_parameters
            + self.head_parameters
            + self.final_parameters
        )

    @cached_property
    def active_parameters(self) -> int:
        """Parameters that one token meets: all of them without experts."""
        idle = self.experts - self.experts_per_token
        return self.parameters - self.expert_layers * idle * self.expert_parameters
