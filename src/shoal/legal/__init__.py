"""What is legal: which layout, policy and codec a model family supports, from config.json alone."""

from shoal.legal.facts import ModelFacts
from shoal.legal.families.table import axes_of, facts_from_config, family_of, known_families
from shoal.legal.rules import (
    CODECS,
    OWN_PARAMETERS,
    POLICIES,
    SHARD_LEVELS,
    Combination,
    illegal,
    not_yet,
    open_axes,
    problems,
    tensor_degrees,
)
from shoal.legal.shrink import shrunk

__all__ = [
    "CODECS",
    "OWN_PARAMETERS",
    "POLICIES",
    "SHARD_LEVELS",
    "Combination",
    "ModelFacts",
    "axes_of",
    "facts_from_config",
    "family_of",
    "illegal",
    "known_families",
    "not_yet",
    "open_axes",
    "problems",
    "shrunk",
    "tensor_degrees",
]
