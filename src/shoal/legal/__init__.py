"""What is legal: which layout, policy and codec a model family supports, from config.json alone."""

from shoal.legal.facts import ModelFacts
from shoal.legal.families import (
    FAMILIES,
    TENSOR_FAMILIES,
    axes_of,
    facts_from_config,
)
from shoal.legal.rules import (
    CODECS,
    IMPLEMENTED_AXES,
    IMPLEMENTED_CODECS,
    IMPLEMENTED_POLICIES,
    POLICIES,
    RECOMPUTE,
    SHARD_LEVELS,
    not_yet,
    problems,
    tensor_degrees,
)
from shoal.legal.shrink import shrunk

__all__ = [
    "CODECS",
    "FAMILIES",
    "IMPLEMENTED_AXES",
    "IMPLEMENTED_CODECS",
    "IMPLEMENTED_POLICIES",
    "POLICIES",
    "RECOMPUTE",
    "SHARD_LEVELS",
    "TENSOR_FAMILIES",
    "ModelFacts",
    "axes_of",
    "facts_from_config",
    "not_yet",
    "problems",
    "shrunk",
    "tensor_degrees",
]
